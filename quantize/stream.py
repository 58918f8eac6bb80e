"""Weights from their place in the source to a quantized file, tensor by tensor: memory does not grow with the model.

Every tensor's place in the new file is known before anything is read, so each is written where it belongs as soon as
it is computed, by a thread of its own while the next is read.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kit.dtypes import ITEM_BYTES, torch_type
from kit.errors import ArtifactError
from kit.recipes import Scheme
from kit.safetensors_file import StoredTensor, read_header
from quantize.scales import NotFinite, amax, encode, pack_int4, scale_of

CHUNK_VALUES = 1 << 19  # of a weight in fp32 at once: what the cores' own caches hold
Progress = Callable[[int], None]  # told of bytes of the source that are done


@dataclass(frozen=True)
class Slot:
    """One tensor of the new file."""

    name: str
    dtype: str  # safetensors' word
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Conversion(Protocol):
    """One tensor of the source that becomes one or two of the new file."""

    @property
    def slots(self) -> tuple[Slot, ...]: ...

    @property
    def source_bytes(self) -> int: ...

    def run(self, progress: Progress) -> Iterator[tuple[str, int, memoryview]]:
        """Yield pieces of the new tensors: name, offset in the tensor, bytes."""
        ...


@dataclass(frozen=True)
class Kept:
    """A tensor that goes over as it is, or times a factor per column, in its own type."""

    source: StoredTensor
    factors: Tensor | None = None  # [last axis], powers of two, so that nothing is rounded

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(self.source.name, self.source.dtype, self.source.shape),)

    @property
    def source_bytes(self) -> int:
        return self.source.nbytes

    def run(self, progress: Progress) -> Iterator[tuple[str, int, memoryview]]:
        if self.factors is not None:
            values = read_rows(self.source, 0, self.source.shape[0]) * self.factors
            yield self.source.name, 0, _bytes(values.to(torch_type(self.source.dtype)))
            progress(self.source.nbytes)
            return
        step = 32 << 20
        with self.source.file.open("rb") as stream:
            for begin in range(0, self.source.nbytes, step):
                stream.seek(self.source.offset + begin)
                piece = stream.read(min(step, self.source.nbytes - begin))
                yield self.source.name, begin, memoryview(piece)
                progress(len(piece))


@dataclass(frozen=True)
class Quantized:
    """Weights [N_i, K] that become one matrix of codes [K, N], as ONNX's MatMul wants it, and fp32 scales.

    More than one where layers read the same activation: one product serves them all. Scales are a scalar per tensor,
    [N] per channel, [K / block, N] per block. Codes of int4 are packed two to a byte along N. `columns` [K] and `rows`
    [N] multiply the weights before they are quantized (SmoothQuant), `scales` those of sources stored in FP8.
    """

    sources: tuple[StoredTensor, ...]
    scheme: Scheme
    scales: tuple[float, ...]
    columns: Tensor | None = None
    rows: Tensor | None = None

    @property
    def name(self) -> str:
        """Name what comes of it after the first of its sources."""
        name = self.sources[0].name
        return name if len(self.sources) == 1 else f"{name}+{len(self.sources) - 1}"

    @property
    def codes_name(self) -> str:
        return f"{self.name}.{self.scheme.weights}"

    @property
    def scales_name(self) -> str:
        return f"{self.name}.scale"

    @property
    def shape(self) -> tuple[int, int]:
        """Return N, K."""
        return sum(source.shape[0] for source in self.sources), self.sources[0].shape[1]

    @property
    def scales_shape(self) -> tuple[int, ...]:
        n, k = self.shape
        match self.scheme.granularity:
            case "tensor":
                return ()
            case "channel":
                return (n,)
            case "block":
                return (k // self.scheme.block, n)

    @property
    def slots(self) -> tuple[Slot, ...]:
        n, k = self.shape
        match self.scheme.weights:
            case "fp8":
                codes = Slot(self.codes_name, "F8_E4M3", (k, n))
            case "int8":
                codes = Slot(self.codes_name, "I8", (k, n))
            case "int4":
                codes = Slot(self.codes_name, "U8", (k, n // 2))
        return codes, Slot(self.scales_name, "F32", self.scales_shape)

    @property
    def source_bytes(self) -> int:
        return sum(source.nbytes for source in self.sources)

    def run(self, progress: Progress) -> Iterator[tuple[str, int, memoryview]]:
        n, k = self.shape
        scales = torch.empty(self.scales_shape)
        fp8 = self.scheme.weights == "fp8"
        codes = torch.empty((k, n), dtype=torch.uint8 if fp8 else torch.int8)
        with _workers() as workers:
            if self.scheme.granularity == "tensor":  # its scale takes a reading of its own
                largest = torch.stack(list(workers.map(self._amax, self._pieces()))).max()
                scales.copy_(scale_of(largest, self.scheme.weights))

            def encode_piece(piece: _Piece) -> int:
                made = self._encode(piece, scales)
                codes[:, piece.begin : piece.end] = (made.view(torch.uint8) if fp8 else made).t().contiguous()
                return (piece.end - piece.begin) * k * ITEM_BYTES[piece.source.dtype]

            for done in workers.map(encode_piece, self._pieces()):
                progress(done)
        yield self.codes_name, 0, _bytes(pack_int4(codes) if self.scheme.weights == "int4" else codes)
        yield self.scales_name, 0, _bytes(scales)

    def _amax(self, piece: _Piece) -> Tensor:
        try:
            return amax(self._values(piece), scratch=_workspace.magnitudes)
        except NotFinite as error:
            raise _not_finite(piece.source, error) from None

    def _encode(self, piece: _Piece, scales: Tensor) -> Tensor:
        """Return the codes [rows, K] of a piece; its scales go to their place in `scales` unless they stand there."""
        values, number = self._values(piece), self.scheme.weights
        rows, k = values.shape
        try:
            match self.scheme.granularity:
                case "tensor":
                    return encode(values, scales, number)
                case "channel":
                    scale = scale_of(amax(values, 1, _workspace.magnitudes), number)
                    scales[piece.begin : piece.end] = scale
                    return encode(values, scale[:, None], number)
                case "block":
                    blocks = values.view(rows, k // self.scheme.block, self.scheme.block)
                    scale = scale_of(amax(blocks, 2, _workspace.magnitudes), number)
                    scales[:, piece.begin : piece.end] = scale.T
                    return encode(blocks, scale[:, :, None], number).view(rows, k)
        except NotFinite as error:
            raise _not_finite(piece.source, error) from None

    def _pieces(self) -> Iterator[_Piece]:
        """Cut the weights into a few rows each."""
        offset = 0
        for source, scale in zip(self.sources, self.scales, strict=True):
            n, k = source.shape
            step = max(1, CHUNK_VALUES // k)
            for first in range(0, n, step):
                last = min(first + step, n)
                yield _Piece(source, scale, first, last, offset + first)
            offset += n

    def _values(self, piece: _Piece) -> Tensor:
        """Read a piece in fp32, scaled and smoothed; the memory is the thread's own and holds until its next piece."""
        values = _read(piece.source, piece.first, piece.last, _workspace)
        if piece.scale != 1.0:
            values *= piece.scale
        if self.columns is not None:
            values *= self.columns
        if self.rows is not None:
            values *= self.rows[piece.begin : piece.end, None]
        return values


@dataclass(frozen=True)
class _Piece:
    """Rows `first` to `last` of one source; they begin at row `begin` of the joint matrix."""

    source: StoredTensor
    scale: float
    first: int
    last: int
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.last - self.first


class _Workspace(threading.local):
    """Memory that each thread uses again for every piece: fresh memory costs more than the arithmetic on it."""

    raw = bytearray()
    floats = torch.empty(0)
    magnitudes = torch.empty(0)


_workspace = _Workspace()


@contextmanager
def _workers() -> Iterator[ThreadPoolExecutor]:
    """Give a thread for each core, in which torch's own operators keep to that one thread.

    Operators that are spread over all cores wait for the slowest of them, thousands of times a second; pieces do not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)


def _not_finite(source: StoredTensor, error: NotFinite) -> ArtifactError:
    return ArtifactError(f"{source.file}: tensor {source.name!r} {error}; it cannot be quantized")


def read_rows(source: StoredTensor, begin: int, end: int) -> Tensor:
    """Read rows `begin` to `end` of a stored tensor as fp32."""
    return _read(source, begin, end, _Workspace())


def write(jobs: Sequence[Conversion], path: Path, progress: Progress = lambda done: None) -> dict[str, StoredTensor]:
    """Write a safetensors file from jobs and return where each tensor lies."""
    slots = [slot for job in jobs for slot in job.slots]
    slots.sort(key=lambda slot: -ITEM_BYTES[slot.dtype])  # so that every tensor is aligned to its items
    header, places, end = {}, {}, 0
    for slot in slots:
        header[slot.name] = {"dtype": slot.dtype, "shape": list(slot.shape), "data_offsets": [end, end + slot.nbytes]}
        places[slot.name] = end
        end += slot.nbytes
    assert len(header) == len(slots), "two tensors of one name"
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    data = 8 + len(text)
    with path.open("wb") as stream, ThreadPoolExecutor(1) as writer:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(data + end)
        stream.flush()
        pending: list[Future[None]] = []
        for job in jobs:
            for name, offset, piece in job.run(progress):
                pending.append(writer.submit(_put, stream.fileno(), piece, data + places[name] + offset))
                while len(pending) > 2:  # so many pieces are in memory at most
                    pending.pop(0).result()
        for last in pending:
            last.result()
    return read_header(path)


def _put(descriptor: int, piece: memoryview, offset: int) -> None:
    while piece:
        done = os.pwrite(descriptor, piece, offset)
        piece, offset = piece[done:], offset + done


def _read(source: StoredTensor, begin: int, end: int, space: _Workspace) -> Tensor:
    row_bytes = source.nbytes // source.shape[0]
    wanted = (end - begin) * row_bytes
    if len(space.raw) < wanted:
        space.raw = bytearray(wanted)
    with source.file.open("rb", buffering=0) as stream:
        stream.seek(source.offset + begin * row_bytes)
        view = memoryview(space.raw)[:wanted]
        while view:
            count = stream.readinto(view)
            if not count:
                raise ArtifactError(f"{source.file}: ends within tensor {source.name!r}; the file is truncated")
            view = view[count:]
    dtype = torch_type(source.dtype)
    stored = torch.frombuffer(space.raw, dtype=dtype, count=wanted // dtype.itemsize)
    if len(space.floats) < len(stored):
        space.floats, space.magnitudes = torch.empty(len(stored)), torch.empty(len(stored))
    values = space.floats[: len(stored)].view(end - begin, *source.shape[1:])
    return values.copy_(stored.view(values.shape))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data.cast("B")
