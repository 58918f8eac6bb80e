"""Compute tensors that are not a byte range of the checkpoint and write them to a separate safetensors file.

They are computed a few rows at a time, so the memory needed does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from export.lora.delta import Term
from export.values import as_stored, read_rows
from kit import safetensors_writer
from kit.dtypes import ITEM_BYTES
from kit.errors import CheckpointError
from kit.safetensors_file import StoredTensor

FILE = "derived.safetensors"
CHUNK_VALUES = 8_000_000  # fp32 values held in memory at once


@dataclass(frozen=True)
class Derived:
    """One tensor to write: a stored tensor, optionally with swapped halves, scaled, or with adapter terms added."""

    name: str
    dtype: str  # the type it is written in
    source: StoredTensor
    swapped: bool = False
    scale: float | None = None  # multiplies the stored values before they are converted
    terms: tuple[Term, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes of the tensor from the first row to the last.

        Raises CheckpointError when a value is not finite or exceeds the range of the type.
        """
        height = self.shape[0]
        half = height // 2 if self.swapped else 0
        terms = [(term.file, term.load(height)) for term in self.terms]
        for begin, end in self._ranges():
            start = (begin + half) % height
            values = read_rows(self.source, start, start + end - begin)
            if self.scale is not None:
                values *= np.float32(self.scale)
            for file, rows in terms:
                values += rows(begin, end)
                if not np.isfinite(values).all():
                    raise CheckpointError(f"{file}: adding it to tensor {self.name!r} gives values that are not finite")
            raw = as_stored(values, self.dtype)
            if self.dtype == "F16" and terms and not np.isfinite(np.frombuffer(raw, np.float16)).all():
                raise CheckpointError(f"{terms[-1][0]}: adding it to tensor {self.name!r} exceeds the range of F16")
            yield raw

    def pieces(self) -> Iterator[safetensors_writer.Piece]:
        """Compute the tensor as pieces of the file that it is written to."""
        offset = 0
        for chunk in self.chunks():
            yield self.name, offset, chunk
            offset += len(chunk)

    def _ranges(self) -> Iterator[tuple[int, int]]:
        """Yield row ranges that fit in memory and do not cross the middle, where halves may be swapped."""
        height = self.shape[0]
        step = max(1, CHUNK_VALUES // prod(self.shape[1:]))
        for first, last in ((0, height // 2), (height // 2, height)):
            for begin in range(first, last, step):
                yield begin, min(begin + step, last)


def write(tensors: Iterable[Derived], path: Path) -> dict[str, StoredTensor]:
    """Write tensors to a safetensors file, in the order of their names, and return where each one is."""
    ordered = sorted(tensors, key=lambda tensor: tensor.name)
    slots = [safetensors_writer.Slot(tensor.name, tensor.dtype, tensor.shape) for tensor in ordered]
    return safetensors_writer.write(path, slots, (piece for tensor in ordered for piece in tensor.pieces()))
