"""Write safetensors files: the header fixes the place of every tensor, then its bytes may come in any order.

The format is described in safetensors_file.py. A tensor can be larger than memory: it is written piece by piece, by a
thread that runs while the next piece is computed.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from kit.dtypes import ITEM_BYTES
from kit.safetensors_file import StoredTensor, read_header

PENDING = 2  # pieces that wait to be written while the next one is computed
Piece = tuple[str, int, bytes | memoryview]  # name of the tensor, offset within it, bytes


@dataclass(frozen=True)
class Slot:
    """One tensor of a file that is to be written."""

    name: str
    dtype: str  # safetensors' word: F32, BF16, F8_E4M3, ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


def reserve(path: Path, slots: Sequence[Slot], header_multiple: int = 8) -> dict[str, StoredTensor]:
    """Write the header and leave a hole for the data; returns where each tensor is, in the order of `slots`.

    The header is padded with spaces until its length is a multiple of `header_multiple`; the reference implementation
    uses 8. Tensors follow each other without gaps, so the caller's order decides their alignment. Raises ValueError for
    two tensors of one name.
    """
    header, end = {}, 0
    for slot in slots:
        if slot.name in header:
            raise ValueError(f"{path}: two tensors have the name {slot.name!r}")
        header[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [end, end + slot.nbytes],
        }
        end += slot.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % header_multiple)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
    return read_header(path)


def write(
    path: Path, slots: Sequence[Slot], pieces: Iterable[Piece], header_multiple: int = 8
) -> dict[str, StoredTensor]:
    """Write a file from pieces of its tensors, in any order; returns where each tensor is.

    Raises ValueError for two tensors of one name, a piece that does not fit its tensor, and a tensor that did not get
    all of its bytes.
    """
    places = reserve(path, slots, header_multiple)
    written: Counter[str] = Counter()
    with path.open("r+b") as stream, ThreadPoolExecutor(1) as writer:
        pending: list[Future[None]] = []
        for name, offset, piece in pieces:
            place, view = places[name], memoryview(piece)
            if offset < 0 or offset + view.nbytes > place.nbytes:
                raise ValueError(
                    f"{path}: tensor {name!r} has {place.nbytes} bytes, a piece goes from {offset} to "
                    f"{offset + view.nbytes}"
                )
            written[name] += view.nbytes
            pending.append(writer.submit(_put, stream.fileno(), view, place.offset + offset))
            while len(pending) > PENDING:
                pending.pop(0).result()
        for last in pending:
            last.result()
    for name, place in places.items():
        if written[name] != place.nbytes:
            raise ValueError(f"{path}: tensor {name!r} has {place.nbytes} bytes, {written[name]} were written")
    return places


def _put(descriptor: int, piece: memoryview, offset: int) -> None:
    while piece:
        done = os.pwrite(descriptor, piece, offset)
        piece, offset = piece[done:], offset + done
