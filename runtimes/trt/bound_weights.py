"""Weights that are inputs of plans: device memory that is filled from safetensors files and bound to contexts.

The memory stays where it is when other weights are loaded, so contexts and captured CUDA graphs keep their addresses.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kit.errors import ArtifactError
from runtimes.trt.cuda import Device
from runtimes.trt.external_weights import ExternalWeights
from runtimes.trt.weight_inputs import SUFFIX, WeightInput, WeightList, files_of

ITEMS: Mapping[int, type[np.generic]] = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}  # bits of values, by width


class BoundWeights:
    """The weights of one part on a device; all plans of the part use the same memory."""

    def __init__(self, device: Device, plan: Path) -> None:
        """Allocate and fill memory for the weights listed beside a plan; raises ArtifactError naming a bad file."""
        self._device = device
        self.listed = WeightList.read(plan.with_suffix(SUFFIX))
        self._memory: dict[str, Any] = {w.name: device.empty((w.nbytes,), "u8") for w in self.listed.weights}
        self._folder = plan.parent  # where the loaded weights are
        self._fill(self._folder, self.listed)

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.listed.weights)

    def addresses(self) -> Iterator[tuple[str, int]]:
        """Yield the name of each input and the address of its memory."""
        for name, memory in self._memory.items():
            yield name, int(memory.data_ptr())

    def load(self, graph: Path) -> None:
        """Load the weights of another graph of the same form: a fine-tune, merged adapters, another quantization.

        The caller must not run the engine meanwhile. Raises ArtifactError, before anything is changed, if the graph has
        other weights, shapes or types, or other quantization scales than the plan; and if a file cannot be read, after
        the previous weights were loaded again.
        """
        other = ExternalWeights(graph).as_inputs()
        if why := self.listed.difference(other):
            raise ArtifactError(f"{graph}: cannot be loaded into this plan: {why}")
        try:
            self._fill(graph.parent, other)
        except (OSError, ArtifactError) as error:
            self._fill(self._folder, self.listed)
            why = str(error.strerror if isinstance(error, OSError) else error)
            raise ArtifactError(f"{graph}: cannot be read ({why}); the previous weights are loaded") from None
        self._folder, self.listed = graph.parent, other

    def _fill(self, folder: Path, listed: WeightList) -> None:
        mapped = {name: _map(folder / name) for name in files_of(listed.weights)}
        for weight in listed.weights:
            values = _read(mapped[weight.file], weight, folder)
            if weight.transposed:
                self._device.upload_transposed(self._memory[weight.name], values)
            else:
                self._device.upload(self._memory[weight.name], values.reshape(-1).view(np.uint8))


def _map(path: Path) -> npt.NDArray[np.uint8]:
    if not path.is_file() or not path.stat().st_size:
        raise ArtifactError(f"{path}: missing or empty; it contains weights of the engine")
    return np.memmap(path, np.uint8, mode="r")


def _read(file: npt.NDArray[np.uint8], weight: WeightInput, folder: Path) -> npt.NDArray[np.generic]:
    if weight.offset + weight.nbytes > len(file):
        raise ArtifactError(
            f"{folder / weight.file}: ends at byte {len(file)}, the weight {weight.name!r} at "
            f"{weight.offset + weight.nbytes}"
        )
    raw = np.array(file[weight.offset : weight.offset + weight.nbytes])  # aligned, and no part of the mapped file
    if not weight.transposed:
        return raw
    return raw.view(ITEMS[weight.nbytes // math.prod(weight.shape)]).reshape(weight.shape)
