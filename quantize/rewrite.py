"""Insert standard QuantizeLinear and DequantizeLinear around linear layers, in the form that runtimes fuse.

    x -> Q -> DQ -> MatMul <- DQ <- codes [K, N]

No node may come between a DQ and its MatMul; TensorRT and ONNX Runtime both require that. Weights are stored as codes
and have only a DQ; activations have one scale per tensor. Layers with the same input become one product whose result is
split: this gives one Q and one large GEMM, and ONNX Runtime (1.32) does not fuse products whose DQs share a Q. Scales
are fp32 in any graph (opset 23); the DQ's `output_dtype` is the compute type of the graph, the only difference between
the fp32 and the bf16 form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kit.dtypes import onnx_type
from kit.graph_values import constant, describe
from kit.recipes import SCHEMES, Scheme
from kit.safetensors_file import StoredTensor
from quantize.conversions import Quantized
from quantize.linears import Linear


@dataclass(frozen=True)
class Change:
    """The quantization of one linear layer, or of several with the same input."""

    linears: tuple[Linear, ...]
    scheme: Scheme
    job: Quantized
    scale: float | None  # of the activation, per tensor; None if only the weights are quantized

    @property
    def name(self) -> str:
        """Return the name of the first layer."""
        return self.linears[0].name

    @property
    def scheme_name(self) -> str:
        return next(name for name, scheme in SCHEMES.items() if scheme == self.scheme)

    @property
    def activation(self) -> ir.Value:
        return self.linears[0].activation


def rewrite(model: ir.Model, changes: list[Change], written: Mapping[str, StoredTensor], compute: ir.DataType) -> bool:
    """Quantize linear layers of a graph in place.

    `written` locates codes and scales, `compute` is the output type of the DQs. Raises ValueError, naming the layer, if
    the layers of one change have different inputs.
    """
    for change in changes:
        if any(linear.activation is not change.activation for linear in change.linears):
            raise ValueError(f"{change.name}: layers with different inputs cannot become one product")
    for change in changes:
        weight = _dequantize_weight(model, change, written, compute)
        x = change.activation if change.scale is None else _quantize(model, change, compute)
        first = change.linears[0].node
        if len(change.linears) == 1:
            first.replace_input_with(0, x)
            first.replace_input_with(1, weight)
        else:
            _fuse(model, change, x, weight, compute)
    RemoveUnusedNodesPass()(model)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    return bool(changes)


def _fuse(model: ir.Model, change: Change, x: ir.Value, weight: ir.Value, compute: ir.DataType) -> None:
    """Replace several products by one, followed by a Split."""
    first = change.linears[0].node
    outputs = sum(linear.outputs for linear in change.linears)
    product = ir.node("MatMul", [x, weight], name=f"{change.name}+{len(change.linears) - 1}/MatMul")
    shape = None if x.shape is None else ir.Shape([*x.shape[:-1], outputs])
    fused = describe(product.outputs[0], f"{product.name}:0", compute, shape)
    sizes = np.array([linear.outputs for linear in change.linears], np.int64)
    split_sizes = constant(model, f"{change.name}/split_sizes", sizes)
    split = ir.node("Split", [fused, split_sizes], {"axis": -1}, num_outputs=len(sizes))
    split.name = product.name.replace("MatMul", "Split")
    model.graph.insert_before(first, [product, split])
    for linear, made in zip(change.linears, split.outputs, strict=True):
        old = linear.node.outputs[0]
        describe(made, f"{linear.name}/Split:0", compute, old.shape)
        ir.convenience.replace_all_uses_with(old, made)


def _quantize(model: ir.Model, change: Change, compute: ir.DataType) -> ir.Value:
    """Insert Q and DQ after an activation and return the output of the DQ."""
    number, x, name = change.scheme.activations, change.activation, change.name
    assert number is not None
    scale = constant(model, f"{name}/input_scale", np.array(change.scale, np.float32), ir.DataType.FLOAT)
    zero = constant(model, f"{number}_zero_point", np.zeros((), onnx_type(number).numpy()), onnx_type(number))
    quantize = ir.node("QuantizeLinear", [x, scale, zero], name=f"{name}/QuantizeLinear")
    codes = describe(quantize.outputs[0], f"{quantize.name}:0", onnx_type(number), x.shape)
    attributes = {"output_dtype": int(compute)}
    dequantize = ir.node("DequantizeLinear", [codes, scale, zero], attributes, name=f"{name}/DequantizeLinear_input")
    model.graph.insert_before(change.linears[0].node, [quantize, dequantize])
    return describe(dequantize.outputs[0], f"{dequantize.name}:0", compute, x.shape)


def _dequantize_weight(
    model: ir.Model, change: Change, written: Mapping[str, StoredTensor], compute: ir.DataType
) -> ir.Value:
    """Register the codes and scales of a weight, insert a DQ after them and return its output."""
    scheme = change.scheme
    outputs, inputs = change.job.shape
    shape = (inputs, outputs)
    codes = _external(model, written[change.job.codes_name], onnx_type(scheme.weights), shape)
    scales = _external(model, written[change.job.scales_name], ir.DataType.FLOAT, change.job.scales_shape)
    attributes: dict[str, int] = {"output_dtype": int(compute)}
    if scheme.granularity == "channel":
        attributes["axis"] = 1
    if scheme.granularity == "block":
        attributes |= {"axis": 0, "block_size": scheme.block}
    node = ir.node("DequantizeLinear", [codes, scales], attributes, name=f"{change.name}/DequantizeLinear_weight")
    output = describe(node.outputs[0], f"{node.name}:0", compute, ir.Shape(shape))
    model.graph.insert_before(change.linears[0].node, node)
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
