"""Graph side of smoothing: divide an activation's channels where that costs next to nothing."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from kit.graph_values import constant
from quantize.linears import Linear


def fold_modulation(model: ir.Model, linear: Linear, inverse: Tensor, compute: ir.DataType) -> None:
    """Divide an activation norm(x) * (1 + scale) + shift by scaling the two vectors [B, 1, dim] of the modulation.

    Raises ValueError, naming the node, where the activation is made otherwise.
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
        raise ValueError(f"{linear.name}: its input is no norm with scale and shift; it cannot be smoothed")
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
    """Return the stored weight of the norm that makes an activation.

    Raises ValueError, naming the layer, where a norm's weight does not.
    """
    node = linear.activation.producer()
    for value in node.inputs if node is not None and node.op_type == "Mul" else ():
        head = value.producer() if value is not None else None
        source = head.inputs[0] if head is not None and head.op_type == "Cast" else value
        if source is not None and isinstance(source.const_value, ir.ExternalTensor):
            return source
    raise ValueError(f"{linear.name}: its input is no norm with a weight; it cannot be smoothed")


def _is_modulated_norm(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Mul" and any(_made_by(v, "LayerNormalization") for v in node.inputs)


def _made_by(value: ir.Value | None, op: str) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == op


def _vector(model: ir.Model, name: str, values: Tensor, dtype: ir.DataType) -> ir.Value:
    array = values.to(torch.float32).numpy().astype(dtype.numpy())
    return constant(model, name, array, dtype)
