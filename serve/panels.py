"""Cut wide int8 products into panels of columns, which is what ONNX Runtime's CPU kernels want and no file can say.

A product of [M, K] and [K, N] has M x N sums of four bytes, and the kernels (MLAS) go over all of them again for every
slice of K. Where the sums do not fit the last level of cache, a product takes a third longer: at 1,536 rows and 27,648
columns 1.27 instead of 1.70 TOP/s on two cores with 32 MB. Panels compute the very same integers.

The graph is changed when it is loaded, for this provider alone: in artifacts, products stay whole as TensorRT wants
them. A panel is ONNX Runtime's own operator MatMulIntegerToFloat, because its fusion of standard operators takes a
QuantizeLinear with a single reader; activations become uint8 around 128, the type that VNNI multiplies with int8. The
runtime folds the cut of the weights while it loads, one weight at a time, and frees what it was cut from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kit.graph_values import constant, describe

PANEL = "/panel_"  # between the name of a product and the number of a panel of it


@dataclass(frozen=True)
class Product:
    """An int8 product with a stored weight and the operators that quantize around it."""

    node: ir.Node
    quantize: ir.Node
    codes: ir.Value  # [K, N]
    scales: ir.Value  # [N] or []

    @property
    def columns(self) -> int:
        assert self.codes.shape is not None
        return int(self.codes.shape[1])


def in_panels(graph: Path, columns: int) -> bytes | None:
    """Return the model with its wide int8 products cut, or None where there are none; weights stay in their files."""
    model = ir.load(graph)
    return ir.to_proto(model).SerializeToString() if cut(model, columns) else None


def cut(model: ir.Model, columns: int) -> int:
    """Cut all int8 products with more than `columns` columns, in place; returns how many there were."""
    wide = [product for product in find_products(model) if product.columns > columns]
    activations: dict[ir.Value, ir.Value] = {}
    for product in wide:
        codes = product.quantize.outputs[0]
        if codes not in activations:
            activations[codes] = _quantize(model, product.quantize)
        _replace(model, product, activations[codes], columns)
    if wide:
        model.opset_imports["com.microsoft"] = 1
        RemoveUnusedNodesPass()(model)
    return len(wide)


def whole(name: str) -> str:
    """Return the name of the product that a node is or is a panel of."""
    return name.partition(PANEL)[0]


def find_products(model: ir.Model) -> Iterator[Product]:
    """Yield the int8 products of a graph that ONNX Runtime would fuse."""
    for node in model.graph:
        if node.op_type != "MatMul":
            continue
        activation, weight = (_maker(value, "DequantizeLinear") for value in node.inputs)
        if activation is None or weight is None:
            continue
        quantize = _maker(activation.inputs[0], "QuantizeLinear")
        codes, scales = weight.inputs[:2]
        if quantize is None or codes is None or scales is None or not codes.is_initializer():
            continue
        int8 = all(value is not None and value.dtype == ir.DataType.INT8 for value in (codes, quantize.outputs[0]))
        if int8 and weight.attributes.get_int("block_size", 0) == 0 and node.outputs[0].dtype == ir.DataType.FLOAT:
            yield Product(node, quantize, codes, scales)


def _maker(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == operator else None


def _quantize(model: ir.Model, quantize: ir.Node) -> ir.Value:
    """Quantize an activation once more, to the same steps counted from 128."""
    x, scale = quantize.inputs[:2]
    node = ir.node("QuantizeLinear", [x, scale, _middle(model)], name=f"{quantize.name}/uint8")
    model.graph.insert_before(quantize, node)
    return describe(node.outputs[0], f"{node.name}:0", ir.DataType.UINT8, quantize.outputs[0].shape)


def _middle(model: ir.Model) -> ir.Value:
    return constant(model, "uint8_middle", np.array(128, np.uint8))


def _replace(model: ir.Model, product: Product, activation: ir.Value, columns: int) -> None:
    """Compute a product panel by panel; a Split behind it takes whole panels, so that nothing is copied twice."""
    name = product.node.name
    outputs, pieces = _pieces(product)
    widths = [min(columns, piece - start) for piece in pieces for start in range(0, piece, columns)]
    sizes = constant(model, f"panels_{'_'.join(map(str, widths))}", np.array(widths, np.int64))
    codes = ir.node("Split", [product.codes, sizes], {"axis": 1}, num_outputs=len(widths), name=f"{name}/codes")
    nodes = [codes]
    scales: list[ir.Value] = [product.scales] * len(widths)
    if product.scales.shape is not None and len(product.scales.shape) == 1:
        cut_scales = ir.node("Split", [product.scales, sizes], {"axis": 0}, num_outputs=len(widths))
        cut_scales.name = f"{name}/scales"
        nodes.append(cut_scales)
        scales = list(cut_scales.outputs)
    for made in nodes:
        for i, value in enumerate(made.outputs):
            value.name = f"{made.name}:{i}"
    panels = []
    for i, (panel, scale) in enumerate(zip(codes.outputs, scales, strict=True)):
        inputs = [activation, panel, product.quantize.inputs[1], scale, _middle(model)]
        node = ir.node("MatMulIntegerToFloat", inputs, domain="com.microsoft", name=f"{name}{PANEL}{i}")
        describe(node.outputs[0], f"{node.name}:0", ir.DataType.FLOAT, None)
        panels.append(node)
    joined = list(_join(outputs, pieces, [node.outputs[0] for node in panels], columns, name or ""))
    model.graph.insert_before(product.node, [*nodes, *panels, *(node for node, _ in joined if node is not None)])
    for old, (_, new) in zip(outputs, joined, strict=True):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def _pieces(product: Product) -> tuple[list[ir.Value], list[int]]:
    """Return the values that a product ends in and their columns: those of the Split behind it, or its own."""
    result = product.node.outputs[0]
    readers = [node for node, _ in result.uses()]
    if len(readers) == 1 and readers[0].op_type == "Split" and readers[0].attributes.get_int("axis", 0) == -1:
        sizes = readers[0].inputs[1]
        if sizes is not None and sizes.const_value is not None and not result.is_graph_output():
            return list(readers[0].outputs), [int(size) for size in sizes.const_value.numpy()]
    return [result], [product.columns]


def _join(
    outputs: list[ir.Value], pieces: list[int], panels: list[ir.Value], columns: int, name: str
) -> Iterator[tuple[ir.Node | None, ir.Value]]:
    """Yield for each output the Concat of its panels, None where it is a single one, and the value."""
    start = 0
    for i, (output, piece) in enumerate(zip(outputs, pieces, strict=True)):
        end = start + -(-piece // columns)
        node = None
        value = panels[start]
        if end - start > 1:
            node = ir.node("Concat", panels[start:end], {"axis": -1}, name=f"{name}/joined_{i}")
            value = node.outputs[0]
        describe(value, output.name or f"{name}/joined_{i}:0", output.dtype, output.shape)
        start = end
        yield node, value
