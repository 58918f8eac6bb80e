"""Quantize the transformer's attention to FP8, in the form that TensorRT fuses into one kernel.

    softmax(Q/DQ(q) Q/DQ(k)^T) -> Q/DQ -> times Q/DQ(v)

All four need a QuantizeLinear: without the one behind the softmax, TensorRT leaves its fused kernel and writes the
scores to memory (2 GB at one megapixel). Only FP8 has such a kernel; INT8 does not.

Scales per tensor. Queries and keys come out of an RMS norm and a rotation, which bound them: the D numbers of a head
have a mean square of one before they are multiplied by the norm's weight w, so none exceeds sqrt(D) max|w|; queries
are also scaled by 1 / sqrt(D). E4M3 has the same relative precision from 448 down to 2^-6, so a bound that is rarely
reached costs nothing. Probabilities are at most one. Values have no bound; calibration has seen the largest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import Tensor

from kit.dtypes import onnx_type
from kit.errors import ArtifactError, UsageError
from kit.graph_values import constant, describe
from kit.variants import Transformer
from quantize.calibration.record import Record
from quantize.linears import stored
from quantize.row_reader import read_rows
from quantize.scales import LARGEST, SMALLEST_SCALE

DOUBLE, SINGLE = "transformer_blocks", "single_transformer_blocks"


@dataclass(frozen=True)
class QuantizedAttention:
    """The attention of one block: its two products, and scales per tensor."""

    block: str  # transformer_blocks.0
    scores: ir.Node  # MatMul of queries and transposed keys
    mix: ir.Node  # MatMul of probabilities and values
    scales: Mapping[str, float]  # of query, key, value, probability


def values(sizes: Transformer) -> dict[str, slice]:
    """Return which outputs of which linear layers attention reads as values."""
    rows = slice(0, sizes.dim)
    double = [f"{DOUBLE}.{i}.attn.{name}" for i in range(sizes.double_blocks) for name in ("to_v", "add_v_proj")]
    single = [f"{SINGLE}.{i}.attn.to_qkv_mlp_proj" for i in range(sizes.single_blocks)]
    return dict.fromkeys(double, rows) | dict.fromkeys(single, slice(2 * sizes.dim, 3 * sizes.dim))


def plan_attentions(
    model: ir.Model, folder: Path, sizes: Transformer, record: Record | None, rows: Mapping[str, Tensor]
) -> tuple[QuantizedAttention, ...]:
    """Plan the attentions of all blocks of a transformer whose weights are in `folder`.

    `rows` are the factors by which smoothing multiplies outputs of layers. Empty if the graph has the Attention
    operator, which has no quantized form. Raises UsageError if the record has not seen the values of a block.
    """
    seen = record.parts.get("transformer", {}) if record is not None else {}
    layers = values(sizes)
    found = []
    for block, scores, mix in _attentions(model):
        seen_values = [
            seen[layer].value_amax * (float(rows[layer][outputs].max()) if layer in rows else 1.0)
            for layer, outputs in layers.items()
            if layer.startswith(f"{block}.") and layer in seen
        ]
        if not seen_values or not max(seen_values):
            raise UsageError(
                f"the calibration record has no values of the attention in {block}, which this recipe "
                'quantizes: calibrate again, or leave out "attention"'
            )
        weights = {kind: _norm_weight(model, folder, f"{block}.attn", kind) for kind in ("q", "k")}
        amax = {
            "query": weights["q"],
            "key": weights["k"] * math.sqrt(sizes.head_dim),
            "value": max(seen_values),
            "probability": 1.0,
        }
        found.append(
            QuantizedAttention(
                block, scores, mix, {name: max(v / LARGEST["fp8"], SMALLEST_SCALE) for name, v in amax.items()}
            )
        )
    return tuple(found)


def _attentions(model: ir.Model) -> Iterator[tuple[str, ir.Node, ir.Node]]:
    """Yield block, first and second product of every attention in a block."""
    for node in model.graph:
        block = ".".join((node.name or "").partition("/")[0].split(".")[:2])
        if node.op_type != "Softmax" or not block.startswith((DOUBLE, SINGLE)) or node.inputs[0] is None:
            continue
        scores, users = node.inputs[0].producer(), list(node.outputs[0].uses())
        if scores is not None and scores.op_type == "MatMul" and [use.node.op_type for use in users] == ["MatMul"]:
            yield block, scores, users[0].node


def _norm_weight(model: ir.Model, folder: Path, attn: str, kind: str) -> float:
    """Return the largest magnitude in the weights of the norms of queries or keys of one attention."""
    names = [f"{attn}.norm_{kind}.weight", f"{attn}.norm_added_{kind}.weight"]
    tensors = [model.graph.initializers[name].const_value for name in names if name in model.graph.initializers]
    if not tensors:
        raise ArtifactError(f"{folder}: the graph has no {names[0]}")
    largest = 0.0
    for tensor in tensors:
        assert isinstance(tensor, ir.ExternalTensor)
        place = stored(tensor, folder)
        largest = max(largest, float(read_rows(place, 0, place.shape[0]).abs().max()))
    return largest


def quantize_attentions(model: ir.Model, attentions: tuple[QuantizedAttention, ...], compute: ir.DataType) -> None:
    """Insert Q and DQ before the operands of both products of every attention."""
    for found in attentions:
        for name, node, place in (
            ("query", found.scores, 0),
            ("key", found.scores, 1),
            ("probability", found.mix, 0),
            ("value", found.mix, 1),
        ):
            value = node.inputs[place]
            assert value is not None
            scale = found.scales[name]
            node.replace_input_with(place, _rounded(model, f"{found.block}.attn.{name}", value, scale, node, compute))


def _rounded(
    model: ir.Model, name: str, value: ir.Value, scale: float, before: ir.Node, compute: ir.DataType
) -> ir.Value:
    """Return a value rounded to FP8, through Q and DQ inserted before a node."""
    number = onnx_type("fp8")
    step = constant(model, f"{name}/scale", np.array(scale, np.float32), ir.DataType.FLOAT)
    zero = constant(model, "fp8_zero_point", np.zeros((), number.numpy()), number)
    quantize = ir.node("QuantizeLinear", [value, step, zero], name=f"{name}/QuantizeLinear")
    codes = describe(quantize.outputs[0], f"{quantize.name}:0", number, value.shape)
    attributes = {"output_dtype": int(compute)}
    dequantize = ir.node("DequantizeLinear", [codes, step, zero], attributes, name=f"{name}/DequantizeLinear")
    model.graph.insert_before(before, [quantize, dequantize])
    return describe(dequantize.outputs[0], f"{dequantize.name}:0", compute, value.shape)
