"""Insert standard QuantizeLinear and DequantizeLinear around linear layers, in the form that runtimes fuse.

    x -> Q -> DQ -> MatMul <- DQ <- codes [K, N]

No node may come between a DQ and its MatMul; TensorRT and ONNX Runtime both require that. Weights are stored as codes
and have only a DQ; activations have one scale per tensor. The DQ's `output_dtype` is the compute type of the graph.

Graphs for a CPU (fp32) and for a GPU (bf16) differ where weights have scales per channel. ONNX Runtime fuses such a DQ
with the product. TensorRT would compute the product with an fp32 result, twice the bytes; so in a bf16 graph the DQ has
the scale one, and the channels' scales, cast to bf16, multiply the result behind the product and its Split. TensorRT
dequantizes blocks of INT4 only to the type of their scales, so these are cast as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kit.dtypes import ITEM_BYTES, onnx_type
from kit.graph_values import constant, describe
from kit.safetensors_file import StoredTensor
from quantize.products import Product, scales_behind


def rewrite(
    model: ir.Model, made: Iterable[Product], written: Mapping[str, StoredTensor], compute: ir.DataType
) -> None:
    """Put products in place of the linear layers of a graph.

    `written` locates codes and scales, `compute` is the output type of the DQs. Raises ValueError, naming the layer, if
    the layers of one change have different inputs.
    """
    made = list(made)
    for product in made:
        change = product.change
        if any(linear.activation is not change.activation for linear in change.linears):
            raise ValueError(f"{change.name}: layers with different inputs cannot become one product")
    inputs: dict[str, ir.Value] = {}  # the quantized activation of each change
    for product in made:
        change = product.change
        weight = _dequantize_weight(model, product, written, compute)
        if change.name not in inputs:
            inputs[change.name] = change.activation if change.scale is None else _quantize(model, product, compute)
        _multiply(model, product, inputs[change.name], weight, written, compute)
    RemoveUnusedNodesPass()(model)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _multiply(
    model: ir.Model,
    product: Product,
    x: ir.Value,
    weight: ir.Value,
    written: Mapping[str, StoredTensor],
    compute: ir.DataType,
) -> None:
    """Compute the outputs of a product: a MatMul, a Split where there are several, and channel scales behind them."""
    name = product.name
    total = sum(size for _, size in product.outputs)
    node = ir.node("MatMul", [x, weight], name=f"{name}/MatMul")
    result = describe(node.outputs[0], f"{node.name}:0", compute, _resized(x, total))
    nodes, values = [node], [result]
    if len(product.outputs) > 1:
        sizes = np.array([size for _, size in product.outputs], np.int64)
        split_sizes = constant(model, f"{product.change.name}/split_sizes", sizes)
        split = ir.node("Split", [result, split_sizes], {"axis": -1}, num_outputs=len(sizes), name=f"{name}/Split")
        nodes.append(split)
        values = [
            describe(value, f"{_layer(old)}/Split:{i}", compute, old.shape)
            for i, (value, (old, _)) in enumerate(zip(split.outputs, product.outputs, strict=True))
        ]
    if scales_behind(product.change, compute):
        stored, begin, scaled = written[product.job.scales_name], 0, []
        for i, (value, (old, size)) in enumerate(zip(values, product.outputs, strict=True)):
            scale = _narrow(model, product, _external(model, _slice(stored, begin, size), (size,)), compute)
            mul = ir.node("Mul", [value, scale], name=f"{name}/Mul_scale_{i}")
            scaled.append(describe(mul.outputs[0], f"{mul.name}:0", compute, old.shape))
            nodes.append(mul)
            begin += size
        values = scaled
    model.graph.insert_before(product.node, nodes)
    for value, (old, _) in zip(values, product.outputs, strict=True):
        ir.convenience.replace_all_uses_with(old, value)


def _layer(value: ir.Value) -> str:
    """Return the name of the layer that computes a value of the original graph."""
    return (value.name or "").rpartition("/")[0]


def _resized(x: ir.Value, size: int) -> ir.Shape | None:
    return None if x.shape is None else ir.Shape([*x.shape[:-1], size])


def _quantize(model: ir.Model, product: Product, compute: ir.DataType) -> ir.Value:
    """Insert Q and DQ after an activation and return the output of the DQ."""
    change = product.change
    number, x, name = change.scheme.activations, change.activation, change.name
    assert number is not None
    scale = constant(model, f"{name}/input_scale", np.array(change.scale, np.float32), ir.DataType.FLOAT)
    zero = constant(model, f"{number}_zero_point", np.zeros((), onnx_type(number).numpy()), onnx_type(number))
    quantize = ir.node("QuantizeLinear", [x, scale, zero], name=f"{name}/QuantizeLinear")
    codes = describe(quantize.outputs[0], f"{quantize.name}:0", onnx_type(number), x.shape)
    attributes = {"output_dtype": int(compute)}
    dequantize = ir.node("DequantizeLinear", [codes, scale, zero], attributes, name=f"{name}/DequantizeLinear_input")
    model.graph.insert_before(product.node, [quantize, dequantize])
    return describe(dequantize.outputs[0], f"{dequantize.name}:0", compute, x.shape)


def _dequantize_weight(
    model: ir.Model, product: Product, written: Mapping[str, StoredTensor], compute: ir.DataType
) -> ir.Value:
    """Register the codes and scales of a weight, insert a DQ after them and return its output."""
    scheme, job = product.change.scheme, product.job
    outputs, inputs = job.shape
    shape = (inputs, outputs)
    codes = _external(model, written[job.codes_name], shape, onnx_type(scheme.weights))
    attributes: dict[str, int] = {"output_dtype": int(compute)}
    if scales_behind(product.change, compute):
        scales = constant(model, "unit_scale", np.ones((), np.float32), ir.DataType.FLOAT)
    else:
        scales = _external(model, written[job.scales_name], job.scales_shape)
        if scheme.granularity == "channel":
            attributes["axis"] = 1
        if scheme.granularity == "block":
            attributes |= {"axis": 0, "block_size": scheme.block}
            scales = _narrow(model, product, scales, compute)
    node = ir.node("DequantizeLinear", [codes, scales], attributes, name=f"{product.name}/DequantizeLinear_weight")
    output = describe(node.outputs[0], f"{node.name}:0", compute, ir.Shape(shape))
    model.graph.insert_before(product.node, node)
    return output


def _narrow(model: ir.Model, product: Product, scales: ir.Value, compute: ir.DataType) -> ir.Value:
    """Cast scales, which bf16 holds exactly, to the compute type; a compiler does that once, when it builds."""
    if compute == ir.DataType.FLOAT:
        return scales
    cast = ir.node("Cast", [scales], {"to": int(compute)}, name=f"{scales.name}/Cast")
    model.graph.insert_before(product.node, cast)
    return describe(cast.outputs[0], f"{cast.name}:0", compute, scales.shape)


def _slice(tensor: StoredTensor, begin: int, count: int) -> StoredTensor:
    """Return a range of a stored vector as a tensor of its own; the whole keeps its name."""
    if count == tensor.shape[0]:
        return tensor
    width = ITEM_BYTES[tensor.dtype]
    name = f"{tensor.name}.{begin}"
    return StoredTensor(name, tensor.dtype, (count,), tensor.file, tensor.offset + begin * width, count * width)


def _external(
    model: ir.Model, tensor: StoredTensor, shape: tuple[int, ...], dtype: ir.DataType | None = None
) -> ir.Value:
    """Register a stored tensor as an initializer; packed codes have a `dtype` of their own."""
    dtype = onnx_type(tensor.dtype) if dtype is None else dtype
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
