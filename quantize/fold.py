"""Apply SmoothQuant's factors: to weights, to the weights of norms and to the modulation vectors in the graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch
from torch import Tensor

from kit.graph_values import constant
from quantize.linears import Linear
from quantize.smoothquant import Smoothing


def weight_factors(
    smoothings: Mapping[str, Smoothing], linears: Mapping[str, Linear]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the factors of the columns and of the rows of each weight, by layer."""
    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for smoothing in smoothings.values():
        if smoothing.alpha is None:
            continue
        for name in smoothing.site.readers:
            columns[name] = smoothing.factors
        inverse = smoothing.inverse
        if smoothing.site.heads is not None:  # query heads that share a key head have one factor
            keys, queries, width = smoothing.site.heads
            inverse = inverse.view(keys, queries, width)[:, 0].reshape(-1)
        for part in smoothing.site.rows:
            made = rows.setdefault(part.layer, torch.ones(linears[part.layer].outputs))
            made[part.begin : part.begin + part.count] *= inverse[part.channel : part.channel + part.count]
    return columns, rows


def fold(
    model: ir.Model, smoothings: Mapping[str, Smoothing], linears: Mapping[str, Linear], compute: ir.DataType
) -> dict[str, Tensor]:
    """Fold the inverse factors into the graph, except those folded into rows; returns the factors of norm weights."""
    factors = {}
    for smoothing in smoothings.values():
        if smoothing.alpha is None or smoothing.site.fold == "rows":
            continue
        reader = linears[smoothing.site.readers[0]]
        _check_readers(reader, smoothing)
        if smoothing.site.fold == "modulation":
            fold_modulation(model, reader, smoothing.inverse, compute)
        else:
            factors[norm_weight(reader).name or ""] = smoothing.inverse
    return factors


def fold_modulation(model: ir.Model, linear: Linear, inverse: Tensor, compute: ir.DataType) -> None:
    """Divide an activation norm(x) * (1 + scale) + shift by scaling the two vectors [B, 1, dim] of the modulation.

    Raises ValueError, naming the layer, if its input is computed in another way.
    """
    add = linear.activation.producer()
    product = next(
        (
            value.producer()
            for value in (add.inputs if add is not None and add.op_type == "Add" else ())
            if value is not None and _is_modulated_norm(value.producer())
        ),
        None,
    )
    if add is None or product is None:
        raise ValueError(f"{linear.name}: its input is not a norm with scale and shift; it cannot be smoothed")
    vector = _vector(model, f"{linear.name}/smooth", inverse, compute)
    for node, big in ((product, "LayerNormalization"), (add, "Mul")):
        place = next(i for i, v in enumerate(node.inputs) if v is not None and not _made_by(v, big))
        small = node.inputs[place]
        scaled = ir.node(
            "Mul", [small, vector], name=f"{linear.name}/Mul_smooth_{'scale' if node is product else 'shift'}"
        )
        scaled.outputs[0].name = f"{scaled.name}:0"
        scaled.outputs[0].type = ir.TensorType(compute)
        scaled.outputs[0].shape = small.shape if small is not None else None
        model.graph.insert_before(node, scaled)
        node.replace_input_with(place, scaled.outputs[0])


def norm_weight(linear: Linear) -> ir.Value:
    """Return the stored weight of the norm that computes the input of a layer.

    Raises ValueError, naming the layer, if its input is computed in another way.
    """
    node = linear.activation.producer()
    for value in node.inputs if node is not None and node.op_type == "Mul" else ():
        head = value.producer() if value is not None else None
        source = head.inputs[0] if head is not None and head.op_type == "Cast" else value
        if source is not None and isinstance(source.const_value, ir.ExternalTensor):
            return source
    raise ValueError(f"{linear.name}: its input is not a norm with a weight; it cannot be smoothed")


def _check_readers(reader: Linear, smoothing: Smoothing) -> None:
    """Check that a smoothed activation is read only by the layers whose weights compensate for it."""
    users = {(use.node.name or "").rpartition("/")[0] for use in reader.activation.uses()}
    if users != set(smoothing.site.readers):
        raise AssertionError(f"{reader.activation.name} is read by {sorted(users)}, not {smoothing.site.readers}")


def _is_modulated_norm(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Mul" and any(_made_by(v, "LayerNormalization") for v in node.inputs)


def _made_by(value: ir.Value | None, op: str) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op


def _vector(model: ir.Model, name: str, values: Tensor, dtype: ir.DataType) -> ir.Value:
    array = values.to(torch.float32).numpy().astype(dtype.numpy())
    return constant(model, name, array, dtype)
