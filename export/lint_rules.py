"""Restrictions of TensorRT's parser that can be decided from a graph, one small rule each.

A rule takes a node and yields what is wrong with it and what to do. Rules come from operators.md (see operators.py) and
from TensorRT's documented handling of QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

Complaint = tuple[str, str]  # what is wrong, what to do
Rule = Callable[[ir.Node], Iterator[Complaint]]
EIGHT_BIT = {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4, ir.DataType.FLOAT4E2M1}
QUANTIZED = EIGHT_BIT | {ir.DataType.UINT8, ir.DataType.UINT4, ir.DataType.FLOAT8E5M2}
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
RESIZE_COORDINATES = {"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"}
RESIZE_NEAREST = {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"}


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, None when it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else str(attribute.as_string())


def number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def is_constant(value: ir.Value | None) -> bool:
    return value is not None and (value.const_value is not None or value.is_initializer())


def constant(index: int, name: str) -> Rule:
    """Make a rule: an input must be known when the engine is built."""

    def rule(node: ir.Node) -> Iterator[Complaint]:
        if operand(node, index) is not None and not is_constant(operand(node, index)):
            yield f"{name} is computed in the graph, it must be an initializer", f"export {name} as a constant"

    return rule


def squeeze(node: ir.Node) -> Iterator[Complaint]:
    if operand(node, 1) is None:
        yield "axes are left out, which only TensorRT 11.5 takes", "name the axes"


def first_output_only(node: ir.Node) -> Iterator[Complaint]:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        yield "only the first output is supported", "compute the other outputs with operators of their own"


def attention(node: ir.Node) -> Iterator[Complaint]:
    for index, name in enumerate(("Q", "K", "V", "attn_mask")):
        value = operand(node, index)
        if value is not None and value.shape is not None and len(value.shape) != 4:
            yield f"{name} has {len(value.shape)} dimensions, it must have 4", f"reshape {name} to [B, heads, S, D]"
    for index, name in enumerate(("past_key", "past_value", "nonpad_kv_seqlen"), start=4):
        if operand(node, index) is not None:
            yield f"{name} is not supported", "concatenate the cache to K and V before the operator"
    yield from first_output_only(node)
    for name in ("softcap", "qk_matmul_output_mode"):
        if number(node, name, 0):
            yield f"attribute {name} is not supported", "export with --attention matmul"


def resize(node: ir.Node) -> Iterator[Complaint]:
    choices = (
        ("coordinate_transformation_mode", "half_pixel", RESIZE_COORDINATES),
        ("mode", "nearest", {"nearest", "linear"}),
        ("keep_aspect_ratio_policy", "stretch", {"stretch"}),
    )
    for name, default, allowed in choices:
        if text(node, name, default) not in allowed:
            yield f"{name} {text(node, name, default)!r} is not supported", f"use one of: {', '.join(sorted(allowed))}"
    nearest = text(node, "nearest_mode", "round_prefer_floor")
    if text(node, "mode", "nearest") == "nearest" and nearest not in RESIZE_NEAREST:
        yield f"nearest_mode {nearest!r} is not supported", f"use one of: {', '.join(sorted(RESIZE_NEAREST))}"
    if number(node, "antialias", 0):
        yield "antialiasing is not supported", "set antialias to 0"


def no_reduction(node: ir.Node) -> Iterator[Complaint]:
    if text(node, "reduction", "none") != "none":
        yield f"reduction {text(node, 'reduction', 'none')!r} is not supported", "scatter without a reduction"


def top_k(node: ir.Node) -> Iterator[Complaint]:
    if not number(node, "sorted", 1):
        yield "sorted must be 1", "sort the result"
    count = operand(node, 1)
    if count is not None and count.const_value is not None and int(count.const_value.numpy().max()) >= 3840:
        yield f"K is {int(count.const_value.numpy().max())}, it must be less than 3840", "choose fewer"


def position_ids(node: ir.Node) -> Iterator[Complaint]:
    value = operand(node, 3)
    if value is not None and value.dtype not in (None, ir.DataType.INT64):
        yield f"position_ids are {value.dtype}, they must be INT64", "cast them to INT64"


def ones(name: str) -> Rule:
    """Make a rule: a list attribute must be absent or all ones."""

    def rule(node: ir.Node) -> Iterator[Complaint]:
        attribute = node.attributes.get(name)
        if attribute is not None and any(v != 1 for v in attribute.as_ints()):
            yield f"{name} {list(attribute.as_ints())} must be empty or all ones", f"remove {name}"

    return rule


def quantize(node: ir.Node) -> Iterator[Complaint]:
    """QuantizeLinear stands on an activation: one scale, read by DequantizeLinear alone."""
    yield from _scale_and_zero(node)
    scale, output = operand(node, 1), node.outputs[0]
    several = scale is not None and scale.shape is not None and any(size != 1 for size in scale.shape)
    if several and not is_constant(operand(node, 0)):
        yield "an activation has more than one scale", "quantize activations per tensor"
    if output.dtype is not None and output.dtype not in EIGHT_BIT:
        yield f"quantizes to {output.dtype}; TensorRT has INT8, FP8 E4M3, INT4 and FP4", "use a signed type"
    if output.is_graph_output() or any(use.node.op_type != "DequantizeLinear" for use in output.uses()):
        yield "its output goes to something else than DequantizeLinear", "put a DequantizeLinear behind it"


def dequantize(node: ir.Node) -> Iterator[Complaint]:
    """DequantizeLinear follows a QuantizeLinear or a quantized weight, and gives the compute type."""
    yield from _scale_and_zero(node)
    value, output = operand(node, 0), node.outputs[0]
    if value is not None and not is_constant(value):
        before = value.producer()
        if before is None or before.op_type != "QuantizeLinear":
            yield "its input is neither a QuantizeLinear nor an initializer", "remove what stands between"
    if value is not None and value.dtype is not None and value.dtype not in EIGHT_BIT:
        yield f"dequantizes {value.dtype}; TensorRT has INT8, FP8 E4M3, INT4 and FP4", "use a signed type"
    if output.dtype is not None and output.dtype not in FLOATS:
        yield f"gives {output.dtype}", "dequantize to FP32, FP16 or BF16"


def _scale_and_zero(node: ir.Node) -> Iterator[Complaint]:
    value, scale, zero = (operand(node, i) for i in range(3))
    if scale is None or not is_constant(scale):
        yield "its scale is not an initializer", "export scales as constants"
        return
    if scale.dtype not in FLOATS:
        yield f"its scale is {scale.dtype}", "store scales as FP32"
    if scale.const_value is not None:
        numbers = scale.const_value.numpy().astype(np.float64)
        if not np.isfinite(numbers).all() or (numbers <= 0).any():
            yield "its scale is not strictly positive", "calibrate again; an amax of zero or NaN gives such a scale"
    block = int(number(node, "block_size", 0))
    many = scale.shape is not None and len(scale.shape) == 1 and scale.shape[0] != 1
    if many and not block and value is not None and value.shape is not None:
        axis = int(number(node, "axis", 1))
        if not -len(value.shape) <= axis < len(value.shape):
            yield f"axis {axis} is outside the {len(value.shape)} dimensions of its input", "set axis"
        elif isinstance(value.shape[axis], int) and value.shape[axis] != scale.shape[0]:
            yield (
                f"has {scale.shape[0]} scales for the {value.shape[axis]} entries of axis {axis}",
                "give every entry of the axis a scale",
            )
    if zero is not None:
        if not is_constant(zero):
            yield "its zero point is computed", "export it as a constant, or leave it out"
        elif zero.const_value is not None and zero.const_value.numpy().astype(np.float32).any():
            yield "its zero point is not zero", "quantize symmetrically"


REDUCES = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
RULES: Mapping[str, tuple[Rule, ...]] = {
    **{f"Reduce{name}": (constant(1, "axes"),) for name in REDUCES},
    "Squeeze": (squeeze, constant(1, "axes")),
    "Unsqueeze": (constant(1, "axes"),),
    "CumSum": (constant(1, "axis"),),
    "OneHot": (constant(1, "depth"),),
    "Dropout": (constant(2, "training_mode"),),
    "Attention": (attention,),
    "LayerNormalization": (first_output_only,),
    "MaxPool": (first_output_only, ones("dilations")),
    "AveragePool": (ones("dilations"),),
    "LpPool": (ones("dilations"),),
    "Resize": (resize,),
    "ScatterND": (no_reduction,),
    "TopK": (top_k,),
    "RotaryEmbedding": (position_ids,),
    "QuantizeLinear": (quantize,),
    "DequantizeLinear": (dequantize,),
}
