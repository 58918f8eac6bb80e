"""Split wide int8 products into panels of columns, so that the sums of ONNX Runtime's CPU kernels fit the cache.

A product of [M, K] and [K, N] has M x N sums of four bytes, and the kernels read and write all of them for every slice
of K (MLAS, `MlasGemmQuantPackedOperation` in qgemm.h: K is the outer loop, then N, then M). If the sums do not fit the
last-level cache, this costs a quarter of the speed. Panels compute identical integers; `python -m benchmarks cpu --only
ratio` runs a step both ways.

Column-wise operators after a product stay in panels: the halves of SwiGLU, its products, and the quantization of the
next layer's input. Only then are the panels joined, at one byte per value. The graph is changed while it is loaded, for
this provider only; in artifacts, products are not split, because TensorRT fuses whole ones. A panel is ONNX Runtime's
operator MatMulIntegerToFloat, because its fusion of standard operators requires a QuantizeLinear with a single reader.
Activations become uint8 with zero point 128, the type that VNNI multiplies with int8. While loading, the runtime folds
the split of the weights, one weight at a time, and frees the originals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kit.graph_values import constant, describe

PANEL = "/panel_"  # separates the name of a node from the index of its panel


@dataclass(frozen=True)
class Product:
    """An int8 product with a stored weight, and the operators that quantize its operands."""

    node: ir.Node
    quantize: ir.Node
    codes: ir.Value  # [K, N]
    scales: ir.Value  # [N] or []

    @property
    def columns(self) -> int:
        assert self.codes.shape is not None
        return int(self.codes.shape[1])


@dataclass(frozen=True)
class Piece:
    """A range of columns of a value, as a separate value."""

    value: ir.Value
    columns: int


Pieces = tuple[Piece, ...]


def in_panels(graph: Path, columns: int) -> bytes | None:
    """Return the model with its wide int8 products split, or None if it has none; weights stay in their files."""
    model = ir.load(graph)
    return ir.to_proto(model).SerializeToString() if cut(model, columns) else None


def cut(model: ir.Model, columns: int) -> int:
    """Split all int8 products with more than `columns` columns, in place; returns their number."""
    wide = {product.node: product for product in find_products(model) if product.columns > columns}
    if not wide:
        return 0
    cutter = _Cutter(model, columns)
    superseded = {product.quantize for product in wide.values() if _readers(product.quantize) <= wide.keys()}
    for node in tuple(model.graph):
        if node in wide:
            cutter.multiply(wide[node])
        elif node not in superseded:
            cutter.visit(node)
    for i, value in enumerate(model.graph.outputs):
        if value in cutter.pieces:
            joined = cutter.join(value, None)
            joined.name, value.name = value.name, f"{value.name}/whole"
            model.graph.outputs[i] = joined
    model.opset_imports["com.microsoft"] = 1
    RemoveUnusedNodesPass()(model)
    return len(wide)


def whole(name: str) -> str:
    """Return the name of the node that a panel was split from, or the name itself if it is no panel."""
    return name.partition(PANEL)[0]


def find_products(model: ir.Model) -> Iterator[Product]:
    """Yield the int8 products that ONNX Runtime would fuse."""
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


def _readers(quantize: ir.Node) -> set[ir.Node]:
    """Return the readers of an activation that is quantized and dequantized."""
    return {reader for between, _ in quantize.outputs[0].uses() for reader, _ in between.outputs[0].uses()}


class _Cutter:
    """Visits the nodes in order and tracks which values exist in pieces along their last axis."""

    def __init__(self, model: ir.Model, columns: int) -> None:
        self.model = model
        self.columns = columns
        self.pieces: dict[ir.Value, Pieces] = {}
        self._joined: dict[ir.Value, ir.Value] = {}
        self._quantized: dict[ir.Value, ir.Value] = {}

    def multiply(self, product: Product) -> None:
        """Compute a product panel by panel; no panel crosses a column at which a reader splits it."""
        node, name = product.node, product.node.name
        activation = self._quantize(product)
        edges = sorted({0, product.columns, *(edge for reader, _ in node.outputs[0].uses() for edge in _edges(reader))})
        widths = [
            min(self.columns, end - at) for start, end in pairwise(edges) for at in range(start, end, self.columns)
        ]
        sizes = constant(self.model, f"panels_{'_'.join(map(str, widths))}", np.array(widths, np.int64))
        codes = self._split(product.codes, sizes, len(widths), 1, f"{name}/codes", node)
        scales = [product.scales] * len(widths)
        if product.scales.shape is not None and len(product.scales.shape) == 1:
            scales = self._split(product.scales, sizes, len(widths), 0, f"{name}/scales", node)
        made = []
        for panel, scale in zip(codes, scales, strict=True):
            inputs = [activation, panel, product.quantize.inputs[1], scale, self._middle()]
            made.append(ir.node("MatMulIntegerToFloat", inputs, domain="com.microsoft"))
        self._keep(node, made, tuple(widths))

    def visit(self, node: ir.Node) -> None:
        """Keep pieces through a node that works column by column; join them before any other node."""
        given = [self.pieces.get(value) if value is not None else None for value in node.inputs]
        if not any(given):
            return
        first = given[0]
        if node.op_type in ("Split", "Slice") and first is not None:
            edges = [0, *accumulate(piece.columns for piece in first)]
            parts = [_within(first, edges, *bounds) for bounds in _bounds(node)]
            if parts and all(parts):
                self.pieces.update(zip(node.outputs, parts, strict=True))
                return
        if node.op_type in ("Sigmoid", "Mul") and all(given) and len({_widths(pieces) for pieces in given}) == 1:
            operands = zip(*(pieces for pieces in given if pieces is not None), strict=True)
            made = [ir.node(node.op_type, [piece.value for piece in pieces]) for pieces in operands]
            self._keep(node, made, _widths(first))
            return
        if node.op_type == "Concat" and _along_last(node) and (joined := self._chain(node, given)):
            self.pieces[node.outputs[0]] = joined
            return
        for i, value in enumerate(node.inputs):
            if value is not None and value in self.pieces:
                node.replace_input_with(i, self.join(value, node))

    def join(self, value: ir.Value, before: ir.Node | None) -> ir.Value:
        """Return a value in one piece; `before` is its reader, None at the end of the graph."""
        if value not in self._joined:
            self._joined[value] = self._concat(self._values(value), f"{value.name}/joined", value, before)
        return self._joined[value]

    def _values(self, value: ir.Value) -> list[ir.Value]:
        """Return the values of the pieces of a value, or the value itself if it is whole."""
        return [piece.value for piece in self.pieces[value]] if value in self.pieces else [value]

    def _concat(self, values: list[ir.Value], name: str, like: ir.Value, before: ir.Node | None) -> ir.Value:
        if len(values) == 1:
            return values[0]
        node = ir.node("Concat", values, {"axis": -1}, name=name)
        self._insert(node, before)
        return describe(node.outputs[0], f"{name}:0", values[0].dtype, like.shape)

    def _quantize(self, product: Product) -> ir.Value:
        """Quantize an activation piece by piece, with the same scale and zero point 128, and join the bytes."""
        old = product.quantize
        x, scale = old.inputs[:2]
        codes = old.outputs[0]
        assert x is not None
        if codes not in self._quantized:
            made = [ir.node("QuantizeLinear", [value, scale, self._middle()]) for value in self._values(x)]
            name = f"{old.name}/uint8"
            panels = self._panels(name, made, ir.DataType.UINT8, product.node)
            self._quantized[codes] = self._concat(panels, f"{name}/joined", codes, product.node)
        return self._quantized[codes]

    def _chain(self, node: ir.Node, given: list[Pieces | None]) -> Pieces | None:
        """Return the pieces of a Concat, or None if the width of an input is unknown."""
        chained: list[Piece] = []
        for value, pieces in zip(node.inputs, given, strict=True):
            if pieces is not None:
                chained += pieces
            elif value is not None and value.shape is not None and isinstance(value.shape[-1], int):
                chained.append(Piece(value, value.shape[-1]))
            else:
                return None
        return tuple(chained)

    def _keep(self, node: ir.Node, made: list[ir.Node], widths: tuple[int, ...]) -> None:
        """Insert the panels before the node they replace, and record them as the pieces of its result."""
        values = self._panels(node.name or "", made, ir.DataType.FLOAT, node)
        self.pieces[node.outputs[0]] = tuple(Piece(*piece) for piece in zip(values, widths, strict=True))

    def _panels(self, name: str, made: list[ir.Node], dtype: ir.DataType, before: ir.Node) -> list[ir.Value]:
        """Name single-output nodes as panels, insert them into the graph and return their outputs."""
        for i, panel in enumerate(made):
            panel.name = f"{name}{PANEL}{i}"
            describe(panel.outputs[0], f"{panel.name}:0", dtype, None)
            self._insert(panel, before)
        return [panel.outputs[0] for panel in made]

    def _split(
        self, value: ir.Value, sizes: ir.Value, count: int, axis: int, name: str, before: ir.Node
    ) -> list[ir.Value]:
        node = ir.node("Split", [value, sizes], {"axis": axis}, num_outputs=count, name=name)
        for i, output in enumerate(node.outputs):
            output.name = f"{name}:{i}"
        self._insert(node, before)
        return list(node.outputs)

    def _insert(self, node: ir.Node, before: ir.Node | None) -> None:
        if before is None:
            self.model.graph.append(node)
        else:
            self.model.graph.insert_before(before, node)

    def _middle(self) -> ir.Value:
        return constant(self.model, "uint8_middle", np.array(128, np.uint8))


def _widths(pieces: Pieces | None) -> tuple[int, ...]:
    return tuple(piece.columns for piece in pieces or ())


def _within(pieces: Pieces, edges: list[int], start: int, end: int) -> Pieces:
    """Return the pieces between two columns; none if a piece crosses one of them."""
    end = min(end, edges[-1])
    if start not in edges or end not in edges:
        return ()
    return pieces[edges.index(start) : edges.index(end)]


def _edges(reader: ir.Node) -> list[int]:
    """Return the columns at which a Split or Slice divides its input."""
    return [edge for bounds in _bounds(reader) for edge in bounds if edge < np.iinfo(np.int64).max]


def _bounds(node: ir.Node) -> list[tuple[int, int]]:
    """Return the column range of each output of a Split or Slice along the last axis; empty for other nodes."""
    if node.op_type not in ("Split", "Slice"):
        return []
    known = [value.const_value for value in node.inputs[1:] if value is not None and value.const_value is not None]
    if not known or len(known) < len(node.inputs) - 1:
        return []
    if node.op_type == "Split":
        sizes = known[0].numpy()
        return list(pairwise([0, *accumulate(int(size) for size in sizes)])) if _along_last(node) else []
    if len(known) != 4 or any(tensor.size != 1 for tensor in known):
        return []
    start, end, axis, step = (int(tensor.numpy().reshape(())) for tensor in known)
    return [(start, end)] if step == 1 and 0 <= start < end and _is_last(axis, node.outputs[0]) else []


def _along_last(node: ir.Node) -> bool:
    """Return whether a Split or Concat works along the last axis."""
    return _is_last(node.attributes.get_int("axis", 0), node.outputs[0])


def _is_last(axis: int, value: ir.Value) -> bool:
    return axis == -1 or (value.shape is not None and axis == len(value.shape) - 1)
