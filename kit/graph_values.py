"""Values that a rewrite adds to an ONNX graph: constants, and what is known of an operator's output."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def constant(model: ir.Model, name: str, value: npt.NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
    """Return the initializer of this name, made of `value` (in its own type or in `dtype`) where there is none."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.Tensor(value, dtype=dtype, name=name)
    made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(value.shape), const_value=tensor)
    model.graph.register_initializer(made)
    return made


def describe(value: ir.Value, name: str, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Value:
    """Name a value and note its type and shape as far as they are known; returns it."""
    value.name, value.shape = name, shape
    value.type = None if dtype is None else ir.TensorType(dtype)
    return value
