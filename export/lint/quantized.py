"""Check TensorRT's restrictions on QuantizeLinear, DequantizeLinear and the nodes between them and a product.

TensorRT uses low precision only for the pattern x -> Q -> DQ -> MatMul <- DQ <- weight: eight-bit and four-bit tensors
exist only between a Q and its DQ, or as constants in front of a DQ. A graph that breaks a rule is rejected, or silently
computed in the wide type.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from export.lint.rules import EIGHT_BIT, FLOATS, Complaint, Rule, is_constant, number, operand
from export.values import READABLE, read_all
from kit.dtypes import format_of_onnx
from kit.safetensors_file import StoredTensor

BLOCKED_OPSET = 21
TYPE_OPSETS: Mapping[ir.DataType, int] = {
    ir.DataType.FLOAT8E4M3FN: 19,
    ir.DataType.INT4: BLOCKED_OPSET,
    ir.DataType.FLOAT4E2M1: 23,
}
OUTPUT_DTYPE_OPSETS = {"QuantizeLinear": 21, "DequantizeLinear": 23}
PACKED = {ir.DataType.INT4, ir.DataType.FLOAT4E2M1}  # two values per byte
FP4_BLOCK = 16
PASSING = {"Cast", "Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Flatten", "Expand", "Slice"}
SCALING = {"Mul", "Div", "Add", "Sub"}  # with a constant operand


def quantize(node: ir.Node) -> Iterator[Complaint]:
    """Check QuantizeLinear: it quantizes an activation with one scale and only DequantizeLinear reads it."""
    value, output = operand(node, 0), node.outputs[0]
    if value is not None and value.dtype is not None and value.dtype not in FLOATS:
        yield f"quantizes {value.name}, which is {value.dtype}", "quantize FP32, FP16 or BF16"
    yield from _scales(node, value, output.dtype, value.dtype if value is not None else None)
    if output.dtype is not None and output.dtype not in EIGHT_BIT:
        yield f"quantizes to {output.dtype}; TensorRT supports INT8, FP8 E4M3, INT4 and FP4", "use a signed type"
    if output.dtype == ir.DataType.INT4 and not is_constant(value):
        yield "quantizes an activation to INT4, which TensorRT supports for weights only", "use INT8 or FP8"
    if output.is_graph_output() or any(use.node.op_type != "DequantizeLinear" for use in output.uses()):
        yield "its output is read by an operator other than DequantizeLinear", "insert a DequantizeLinear after it"


def dequantize(node: ir.Node) -> Iterator[Complaint]:
    """Check DequantizeLinear: it reads a QuantizeLinear or a quantized weight and produces the compute type."""
    value, output = operand(node, 0), node.outputs[0]
    yield from _scales(node, value, value.dtype if value is not None else None, output.dtype)
    if value is not None and not is_constant(value):
        before = value.producer()
        if before is None or before.op_type != "QuantizeLinear":
            yield "its input is neither from a QuantizeLinear nor an initializer", "remove the nodes in between"
    if value is not None and value.dtype is not None and value.dtype not in EIGHT_BIT:
        yield f"dequantizes {value.dtype}; TensorRT supports INT8, FP8 E4M3, INT4 and FP4", "use a signed type"
    if output.dtype is not None and output.dtype not in FLOATS:
        yield f"dequantizes to {output.dtype}", "use FP32, FP16 or BF16"


def product(node: ir.Node) -> Iterator[Complaint]:
    """Check that no node prevents the fusion of a product of two dequantized operands into a low-precision one."""
    between = [_behind_dequantize(operand(node, index)) for index in (0, 1)]
    if None in between:
        return  # at most one operand is quantized: weight-only, dequantized before the product
    for chain in between:
        for other in chain or ():
            yield (
                f"{other.name or 'unnamed'} ({other.op_type}) is between DequantizeLinear and the product, which "
                "is therefore not computed in low precision",
                "move it before the QuantizeLinear, or store the weight in a layout that does not need it",
            )


def _behind_dequantize(value: ir.Value | None) -> list[ir.Node] | None:
    """Return the nodes between a value and the DequantizeLinear it comes from; None if there is none."""
    between: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None:
        if node.op_type == "DequantizeLinear":
            return between
        computed = [source for source in node.inputs if source is not None and not is_constant(source)]
        if len(computed) != 1 or node.op_type not in PASSING | SCALING:
            return None
        between.append(node)
        value = computed[0]
    return None


def _scales(
    node: ir.Node, value: ir.Value | None, narrow: ir.DataType | None, wide: ir.DataType | None
) -> Iterator[Complaint]:
    """Check scale, zero point, axis and block size of a node that converts between a narrow and a wide type."""
    yield from _opset(node, narrow)
    scale = operand(node, 1)
    if scale is None or not is_constant(scale):
        yield "its scale is not an initializer", "export scales as constants"
        return
    if scale.dtype not in FLOATS:
        yield f"its scale is {scale.dtype}", "store scales as FP32"
    elif wide in FLOATS and scale.dtype not in (ir.DataType.FLOAT, wide):
        yield f"its scale is {scale.dtype} while the wide type is {wide}", "store scales as FP32 or in the wide type"
    if narrow == ir.DataType.INT4 and number(node, "block_size", 0) and scale.dtype != wide and wide in FLOATS:
        rule = f"{narrow} in blocks has {scale.dtype} scales and a {wide} result, for which TensorRT infers no type"
        yield rule, "store or cast the scales in the type of the result"
    values = _values(scale)
    if values is not None and (not np.isfinite(values).all() or (values <= 0).any()):
        yield "its scale is not strictly positive", "calibrate again; the cause is an amax of zero or NaN"
    yield from _layout(node, value, scale)
    yield from _zero_point(node, scale, narrow)
    sizes = value.shape.numpy() if value is not None and value.shape is not None and value.shape.is_static() else None
    if narrow in PACKED and sizes is not None and np.prod(sizes) % 2:
        yield f"{np.prod(sizes)} elements of {narrow} are an odd number", "pad the weight to an even number of elements"


def _opset(node: ir.Node, narrow: ir.DataType | None) -> Iterator[Complaint]:
    opset = node.graph.opset_imports.get("") if node.graph is not None else None
    if opset is None:
        return
    needs = {f"{narrow}": TYPE_OPSETS.get(narrow, 0) if narrow is not None else 0}
    if number(node, "block_size", 0):
        needs["block_size"] = BLOCKED_OPSET
    if "output_dtype" in node.attributes:
        needs["output_dtype"] = OUTPUT_DTYPE_OPSETS[node.op_type]
    for what, least in needs.items():
        if opset < least:
            yield f"{what} needs opset {least}, the graph has {opset}", "export with opset 23"


def _layout(node: ir.Node, value: ir.Value | None, scale: ir.Value) -> Iterator[Complaint]:
    """Check the layout of the scales: one, one per entry of an axis, or one per block along an axis."""
    if scale.shape is None or not scale.shape.is_static():
        return
    counts = [int(size) for size in scale.shape]
    block = int(number(node, "block_size", 0))
    if all(count == 1 for count in counts) and not block:
        return
    if not _is_weight(value):
        what = "is quantized in blocks" if block else "has more than one scale"
        yield f"an activation {what}", "quantize activations per tensor"
        return
    if value is None or value.shape is None or not value.shape.is_static():
        return
    sizes = [int(size) for size in value.shape]
    axis = int(number(node, "axis", 1))
    if not -len(sizes) <= axis < len(sizes):
        yield f"axis {axis} is outside the {len(sizes)} dimensions of its input", "set axis"
    elif block:
        yield from _blocks(node, sizes, counts, axis % len(sizes), block, value.dtype)
    elif len(counts) != 1:
        yield f"its scales have {len(counts)} dimensions", "give scales one dimension, or a block_size"
    elif sizes[axis] != counts[0]:
        yield (
            f"has {counts[0]} scales for the {sizes[axis]} entries of axis {axis}",
            "give every entry of the axis a scale",
        )


def _blocks(
    node: ir.Node, sizes: list[int], counts: list[int], axis: int, block: int, narrow: ir.DataType | None
) -> Iterator[Complaint]:
    expected = [-(-size // block) if i == axis else size for i, size in enumerate(sizes)]
    if sizes[axis] % block:
        yield (
            f"axis {axis} has {sizes[axis]} entries, which blocks of {block} do not fill",
            "choose a block size that divides it",
        )
    elif counts != expected:
        yield (
            f"has scales {counts}; {sizes} in blocks of {block} along axis {axis} needs {expected}",
            "use blocks along one axis, with one scale per block",
        )
    if narrow == ir.DataType.FLOAT4E2M1 and block != FP4_BLOCK:
        yield f"FP4 in blocks of {block}", f"use blocks of {FP4_BLOCK}"


def _zero_point(node: ir.Node, scale: ir.Value, narrow: ir.DataType | None) -> Iterator[Complaint]:
    zero = operand(node, 2)
    if zero is None:
        return
    if not is_constant(zero):
        yield "its zero point is computed", "export it as a constant or omit it"
        return
    if narrow is not None and zero.dtype not in (None, narrow):
        yield f"its zero point is {zero.dtype}, its codes are {narrow}", "use the same type for both"
    values = _values(zero)
    if values is not None and values.any():
        yield "its zero point is not zero", "quantize symmetrically"
    shapes = zero.shape, scale.shape
    counts = [int(np.prod(shape.numpy())) for shape in shapes if shape is not None and shape.is_static()]
    if len(set(counts)) > 1:
        yield f"has {counts[0]} zero points for {counts[1]} scales", "give zero points the shape of the scales"


def _is_weight(value: ir.Value | None) -> bool:
    """Return whether a quantized tensor, or the tensor it is computed from, is known when the engine is built."""
    if value is None:
        return False
    before = value.producer()
    if before is not None and before.op_type == "QuantizeLinear":
        return is_constant(before.inputs[0])
    return is_constant(value)


def _values(value: ir.Value) -> npt.NDArray[np.float32] | None:
    """Return the values of a constant, also through a Cast; None if they are not available."""
    before = value.producer()
    if before is not None and before.op_type == "Cast" and before.inputs[0] is not None:
        return _values(before.inputs[0])
    tensor = ir.convenience.get_const_tensor(value)
    if isinstance(tensor, ir.ExternalTensor):  # onnx_ir refuses to read a file that a deployment has linked
        found = format_of_onnx(tensor.dtype)
        if found is None or found.stored not in READABLE:
            return None
        shape = tuple(int(size) for size in tensor.shape)
        nbytes = math.prod(shape) * found.bits // 8
        file = Path(tensor.base_dir) / tensor.location
        return read_all(StoredTensor(tensor.name or "", found.stored, shape, file, tensor.offset or 0, nbytes))
    return None if tensor is None else np.asarray(tensor.numpy()).astype(np.float32)


QUANTIZED_RULES: Mapping[str, tuple[Rule, ...]] = {
    "QuantizeLinear": (quantize,),
    "DequantizeLinear": (dequantize,),
    "MatMul": (product,),
    "Gemm": (product,),
    "Conv": (product,),
}
