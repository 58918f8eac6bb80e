"""Give every Squeeze explicit axes, which TensorRT's parser requires before 11.5."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from kit.graph_values import constant


def name_axes(model: ir.Model) -> bool:
    """Give a Squeeze without axes those of size one.

    Raises ValueError, naming the node, if the shape of its input is not known well enough to find them.
    """
    modified = False
    for node in model.graph:
        if node.op_type != "Squeeze" or (len(node.inputs) > 1 and node.inputs[1] is not None):
            continue
        value = node.inputs[0]
        sizes = _sizes(value)
        if sizes is None:
            raise ValueError(f"{node.name}: cannot tell which axes of {value} its Squeeze removes")
        ones = [axis for axis, size in enumerate(sizes) if size == 1]
        axes = constant(model, f"{node.outputs[0].name}_axes", np.array(ones, np.int64))
        node.resize_inputs(2)
        node.replace_input_with(1, axes)
        modified = True
    return modified


def _sizes(value: ir.Value | None) -> list[int] | None:
    """Return the static shape of a value; that of a Shape with start and end needs no inference."""
    if value is None:
        return None
    if value.shape is not None and value.shape.is_static():
        return [int(size) for size in value.shape]
    shape = value.producer()
    if shape is not None and shape.op_type == "Shape" and {"start", "end"} <= set(shape.attributes):
        return [shape.attributes["end"].as_int() - shape.attributes["start"].as_int()]
    return None
