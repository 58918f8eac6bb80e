"""The matrix products that a quantized graph has in place of linear layers: joined, as they were, or cut.

Layers with the same input become one product whose result is split: one QuantizeLinear and one large product, which
ONNX Runtime (1.32) needs, because it fuses no products that share a QuantizeLinear. Where attention is quantized too,
which is for TensorRT, each output that the graph uses has a product of its own, so that no kernel has to copy it out of
a wider one: q, k and v of a block of klein-4b at one megapixel are 28 MB each. In front of attention in bf16, such
products save less and end TensorRT for RTX 1.7.1 with a floating-point exception where heads have 32 or 48 channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import onnx_ir as ir

from kit.safetensors_file import StoredTensor
from quantize.changes import Change
from quantize.conversions import Quantized
from quantize.linears import Linear


@dataclass(frozen=True)
class Product:
    """One product [.., K] x [K, N] of the quantized graph; N is the sum of the sizes of its outputs."""

    name: str  # of its nodes
    change: Change
    job: Quantized
    outputs: tuple[tuple[ir.Value, int], ...]  # values of the graph that it computes, and their last dimensions

    @property
    def node(self) -> ir.Node:
        """The node before which new nodes are inserted."""
        return self.change.linears[0].node


def products(change: Change, compute: ir.DataType, cut: bool = False) -> Iterator[Product]:
    """Yield the products of one change, in a graph that computes in fp32 or bf16; `cut` gives each output its own."""
    if not cut:
        outputs = tuple((linear.node.outputs[0], linear.outputs) for linear in change.linears)
        if scales_behind(change, compute):  # pieces are scaled where they are used, so that no kernel writes them all
            outputs = tuple((value, size) for linear in change.linears for value, _, size in _pieces(linear))
        joined = len(change.linears) - 1
        yield Product(f"{change.name}+{joined}" if joined else change.name, change, change.job, outputs)
        return
    row = 0
    for linear, source, scale in zip(change.linears, change.job.sources, change.job.scales, strict=True):
        pieces = _pieces(linear)
        for index, (value, begin, size) in enumerate(pieces):
            rows = None if change.job.rows is None else change.job.rows[row + begin : row + begin + size]
            part = source if len(pieces) == 1 else _rows(source, begin, size, index)
            job = replace(change.job, sources=(part,), scales=(scale,), rows=rows)
            name = linear.name if len(pieces) == 1 else f"{linear.name}.{index}"
            yield Product(name, change, job, ((value, size),))
        row += linear.outputs


def scales_behind(change: Change, compute: ir.DataType) -> bool:
    """Return whether weight scales multiply the product's result instead of the weights."""
    channels = change.scheme.granularity == "channel" and change.scheme.activations is not None
    return channels and compute == ir.DataType.BFLOAT16


def _pieces(linear: Linear) -> list[tuple[ir.Value, int, int]]:
    """Return the outputs of a layer, or of the Split behind it, each with its first row and number of rows."""
    whole = linear.node.outputs[0]
    users = [use.node for use in whole.uses()]
    sizes = _split_sizes(users[0], linear.outputs) if len(users) == 1 else None
    if sizes is None:
        return [(whole, 0, linear.outputs)]
    begins = [0, *accumulate(sizes)]
    return [(value, begins[i], size) for i, (value, size) in enumerate(zip(users[0].outputs, sizes, strict=True))]


def _split_sizes(node: ir.Node, total: int) -> list[int] | None:
    """Return the constant sizes of a Split of the last axis; None for another node."""
    axis = node.attributes.get("axis")
    if node.op_type != "Split" or axis is None or node.inputs[0] is None:
        return None
    shape = node.inputs[0].shape
    if axis.as_int() != -1 and (shape is None or axis.as_int() != len(shape) - 1):
        return None
    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None:
        if given.const_value is None:
            return None
        return [int(size) for size in np.asarray(given.const_value.numpy())]
    return [total // len(node.outputs)] * len(node.outputs)


def _rows(source: StoredTensor, begin: int, count: int, index: int) -> StoredTensor:
    """Return rows of a stored matrix [N, K] as a tensor of their own."""
    width = source.nbytes // source.shape[0]
    return StoredTensor(
        f"{source.name}.{index}",
        source.dtype,
        (count, *source.shape[1:]),
        source.file,
        source.offset + begin * width,
        count * width,
    )
