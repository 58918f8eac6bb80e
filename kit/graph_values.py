"""Create the values that a rewrite adds to an ONNX graph."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def constant(model: ir.Model, name: str, value: npt.NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
    """Return the initializer of this name; if missing, create it from `value` in its own type or in `dtype`."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.Tensor(value, dtype=dtype, name=name)
    made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(value.shape), const_value=tensor)
    model.graph.register_initializer(made)
    return made


def describe(value: ir.Value, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Value:
    """Name a value and set its type and shape as far as they are known; returns the value."""
    value.name, value.shape = name, shape
    value.type = None if dtype is None else ir.TensorType(dtype)
    return value
