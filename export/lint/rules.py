"""Check restrictions of TensorRT's parser that can be decided from a graph, with one small rule each.

A rule takes a node and yields what is wrong with it and what to do. The rules come from operators.md (see
operators.py); the rules about quantization are in quantized.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import onnx_ir as ir

Complaint = tuple[str, str]  # what is wrong, what to do
Rule = Callable[[ir.Node], Iterator[Complaint]]
EIGHT_BIT = {ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, ir.DataType.INT4, ir.DataType.FLOAT4E2M1}
QUANTIZED = EIGHT_BIT | {ir.DataType.UINT8, ir.DataType.UINT4, ir.DataType.FLOAT8E5M2}
FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
RESIZE_COORDINATES = {"half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"}
RESIZE_NEAREST = {"floor", "ceil", "round_prefer_floor", "round_prefer_ceil"}


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, or None if it is omitted."""
    return node.inputs[index] if index < len(node.inputs) else None


def text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else str(attribute.as_string())


def number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def is_constant(value: ir.Value | None) -> bool:
    """Return whether a value is known when the engine is built: an initializer, a Constant, or a Cast of one."""
    if value is None:
        return False
    node = value.producer()
    if node is not None and node.op_type == "Cast":
        return is_constant(node.inputs[0])
    return value.const_value is not None or value.is_initializer() or (node is not None and node.op_type == "Constant")


def constant(index: int, name: str) -> Rule:
    """Return a rule: an input must be known when the engine is built."""

    def rule(node: ir.Node) -> Iterator[Complaint]:
        if operand(node, index) is not None and not is_constant(operand(node, index)):
            yield f"{name} is computed in the graph, it must be an initializer", f"export {name} as a constant"

    return rule


def squeeze(node: ir.Node) -> Iterator[Complaint]:
    if operand(node, 1) is None:
        yield "axes are omitted, which only TensorRT 11.5 supports", "give the axes explicitly"


def first_output_only(node: ir.Node) -> Iterator[Complaint]:
    if any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        yield "only the first output is supported", "compute the other outputs with separate operators"


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
        yield f"K is {int(count.const_value.numpy().max())}, it must be less than 3840", "choose a smaller K"


def position_ids(node: ir.Node) -> Iterator[Complaint]:
    value = operand(node, 3)
    if value is not None and value.dtype not in (None, ir.DataType.INT64):
        yield f"position_ids are {value.dtype}, they must be INT64", "cast them to INT64"


def ones(name: str) -> Rule:
    """Return a rule: a list attribute must be absent or all ones."""

    def rule(node: ir.Node) -> Iterator[Complaint]:
        attribute = node.attributes.get(name)
        if attribute is not None and any(v != 1 for v in attribute.as_ints()):
            yield f"{name} {list(attribute.as_ints())} must be empty or all ones", f"remove {name}"

    return rule


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
}
