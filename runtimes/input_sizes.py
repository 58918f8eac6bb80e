"""The sizes of a call, read from the shapes of its inputs, which are checked against the ports on the way."""

from __future__ import annotations

from collections.abc import Mapping

from kit.dtypes import number_format
from kit.engine import Array
from kit.errors import EngineError
from kit.ports import Ports, split_axis


def input_sizes(ports: Ports, inputs: Mapping[str, Array]) -> dict[str, int]:
    """Return the size of every named axis; raises EngineError if an input does not fit its port."""
    sizes: dict[str, int] = {}
    for port in ports.inputs:
        if port.name not in inputs:
            raise EngineError(f"input {port.name} is missing; given: {', '.join(inputs)}")
        array = inputs[port.name]
        if array.dtype.name != number_format(port.dtype).numpy:
            raise EngineError(f"input {port.name} is {array.dtype.name}, its port is {port.dtype}")
        for axis, size in zip(port.dims, array.shape, strict=False):
            if isinstance(axis, str):
                factor, name = split_axis(axis)
                sizes.setdefault(name, size // factor)
        if len(array.shape) != len(port.dims) or port.shape(sizes) != array.shape:
            raise EngineError(f"input {port.name} has shape {list(array.shape)}, its port is {list(port.dims)}")
    return sizes
