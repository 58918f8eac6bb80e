"""Put standard QuantizeLinear and DequantizeLinear around linear layers, in the form that runtimes fuse.

    x -> Q -> DQ -> MatMul <- DQ <- codes [K, N]

Nothing stands between a DQ and its MatMul (TensorRT's rule, and ONNX Runtime's). Weights are stored as codes and have a
DQ alone. Activations have one scale per tensor; layers that read the same activation share its Q and DQ, so that a
runtime can merge them. Scales are fp32 whatever the graph computes in (opset 23); `output_dtype` of the DQ is the
graph's compute type, and that is all in which the fp32 and bf16 forms differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kit.tensors import StoredTensor
from quantize.linears import Linear
from quantize.recipes import Number, Scheme
from quantize.stream import Quantized

CODES: Mapping[Number, ir.DataType] = {
    "fp8": ir.DataType.FLOAT8E4M3FN,
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
}


@dataclass(frozen=True)
class Change:
    """What happens to one linear layer."""

    linear: Linear
    scheme: Scheme
    job: Quantized
    scale: float | None  # of the activation, per tensor; None where only the weight is quantized


def rewrite(model: ir.Model, changes: list[Change], written: Mapping[str, StoredTensor]) -> bool:
    """Quantize linear layers of a graph in place; `written` tells where the codes and scales lie.

    Raises ValueError, naming the node, where two layers give one activation two scales.
    """
    quantizers: dict[tuple[str, Number], tuple[ir.Value, float]] = {}
    for change in changes:
        if change.scale is not None:
            assert change.scheme.activations is not None
            key = (change.linear.activation.name or "", change.scheme.activations)
            if key not in quantizers:
                quantizers[key] = _quantize(model, change.linear, change.scheme.activations, change.scale), change.scale
            elif quantizers[key][1] != change.scale:
                raise ValueError(
                    f"{change.linear.name}: its input has scale {quantizers[key][1]} from another layer, "
                    f"not {change.scale}"
                )
    for change in changes:
        node = change.linear.node
        weight = _dequantize_weight(model, change, written)
        if change.scale is not None:
            assert change.scheme.activations is not None
            node.replace_input_with(0, quantizers[change.linear.activation.name or "", change.scheme.activations][0])
        node.replace_input_with(1, weight)
    RemoveUnusedNodesPass()(model)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return bool(changes)


def compute_type(linear: Linear) -> ir.DataType:
    """Return the type in which a linear layer computes."""
    dtype = linear.node.outputs[0].dtype or linear.activation.dtype
    assert dtype is not None, f"{linear.name}: no type"
    return dtype


def _quantize(model: ir.Model, linear: Linear, number: Number, scale: float) -> ir.Value:
    """Put Q and DQ behind an activation and return what the DQ gives."""
    x = linear.activation
    name = f"{linear.name}/input"
    factor = _constant(model, f"{name}_scale", np.float32(scale), ir.DataType.FLOAT)
    zero = _constant(model, f"{name}_zero_point", np.zeros((), CODES[number].numpy()), CODES[number])
    quantize = ir.node("QuantizeLinear", [x, factor, zero], name=f"{linear.name}/QuantizeLinear")
    codes = _describe(quantize.outputs[0], f"{quantize.name}:0", CODES[number], x.shape)
    attributes = {"output_dtype": int(compute_type(linear))}
    dequantize = ir.node(
        "DequantizeLinear", [codes, factor, zero], attributes, name=f"{linear.name}/DequantizeLinear_input"
    )
    output = _describe(dequantize.outputs[0], f"{dequantize.name}:0", compute_type(linear), x.shape)
    model.graph.insert_before(linear.node, [quantize, dequantize])
    return output


def _dequantize_weight(model: ir.Model, change: Change, written: Mapping[str, StoredTensor]) -> ir.Value:
    """Register codes and scales of a weight, put a DQ behind them and return what it gives."""
    linear, scheme = change.linear, change.scheme
    shape = (linear.inputs, linear.outputs)
    codes = _external(model, written[change.job.codes_name], CODES[scheme.weights], shape)
    scales = _external(model, written[change.job.scales_name], ir.DataType.FLOAT, change.job.scales_shape)
    attributes: dict[str, int] = {"output_dtype": int(compute_type(linear))}
    if scheme.granularity == "channel":
        attributes["axis"] = 1
    if scheme.granularity == "block":
        attributes |= {"axis": 0, "block_size": scheme.block}
    node = ir.node("DequantizeLinear", [codes, scales], attributes, name=f"{linear.name}/DequantizeLinear_weight")
    output = _describe(node.outputs[0], f"{node.name}:0", compute_type(linear), ir.Shape(shape))
    model.graph.insert_before(linear.node, node)
    return output


def _external(model: ir.Model, tensor: StoredTensor, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    value = ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    value.const_value = ir.ExternalTensor(
        location=tensor.file.name,
        offset=tensor.offset,
        length=tensor.nbytes,
        dtype=dtype,
        shape=ir.Shape(shape),
        name=tensor.name,
        base_dir="",
    )
    model.graph.register_initializer(value)
    return value


def _constant(model: ir.Model, name: str, value: object, dtype: ir.DataType) -> ir.Value:
    made = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(()))
    made.const_value = ir.Tensor(np.asarray(value), dtype=dtype, name=name)
    model.graph.register_initializer(made)
    return made


def _describe(value: ir.Value, name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    value.name, value.type, value.shape = name, ir.TensorType(dtype), shape
    return value
