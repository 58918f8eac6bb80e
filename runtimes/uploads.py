"""Upload the inputs of a call to the GPU, and leave out what is there already (the promise of kit.engine)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from weakref import ReferenceType, ref

from kit.engine import Array
from runtimes.trt.cuda import Device


class Uploads:
    """The read-only arrays whose values the tensors of one shape hold."""

    def __init__(self) -> None:
        self._held: dict[str, ReferenceType[Array]] = {}  # weak: the caller decides how long an array lives

    def send(
        self, device: Device, names: Iterable[str], tensors: Mapping[str, Any], inputs: Mapping[str, Array]
    ) -> None:
        """Copy inputs to their tensors, except a read-only array that was uploaded last: it has not changed."""
        for name in names:
            array = inputs[name]
            kept = self._held.pop(name, None)
            if array.flags.writeable or kept is None or kept() is not array:
                device.upload(tensors[name], array)
            if not array.flags.writeable:
                self._held[name] = ref(array)
