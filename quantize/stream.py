"""Weights from their place in the source to a quantized file, tensor by tensor: memory does not grow with the model.

Every tensor's place in the new file is known before anything is read, so each is written where it belongs as soon as
it is computed, by a thread of its own while the next is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kit.errors import ArtifactError
from kit.tensors import ITEM_BYTES, StoredTensor, read_header
from quantize.recipes import Scheme
from quantize.scales import NotFinite, amax, encode, pack_int4, scale_of

CHUNK_VALUES = 1 << 20  # of a weight in fp32 at once: what the cores' own caches hold
TORCH_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}
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


class Job(Protocol):
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
            values = _read(self.source, 0, self.source.shape[0]).to(torch.float32) * self.factors
            yield self.source.name, 0, _bytes(values.to(TORCH_TYPES[self.source.dtype]))
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
        whole = self._tensor_scale() if self.scheme.granularity == "tensor" else None
        scales = torch.empty(self.scales_shape)
        fp8 = self.scheme.weights == "fp8"
        codes = torch.empty((k, n), dtype=torch.uint8 if fp8 else torch.int8)
        for source, begin, end, values in self._rows():
            try:
                if whole is not None:
                    made = encode(values, whole, self.scheme.weights)
                elif self.scheme.granularity == "channel":
                    scale = scale_of(amax(values, 1), self.scheme.weights)
                    scales[begin:end] = scale
                    made = encode(values, scale[:, None], self.scheme.weights)
                else:
                    blocks = values.view(end - begin, k // self.scheme.block, self.scheme.block)
                    scale = scale_of(amax(blocks, 2), self.scheme.weights)
                    scales[:, begin:end] = scale.T
                    made = encode(blocks, scale[:, :, None], self.scheme.weights).view(end - begin, k)
            except NotFinite as error:
                raise _not_finite(source, error) from None
            codes[:, begin:end] = (made.view(torch.uint8) if fp8 else made).T
            progress((end - begin) * k * ITEM_BYTES[source.dtype])
        if whole is not None:
            scales.copy_(whole)
        yield self.codes_name, 0, _bytes(pack_int4(codes) if self.scheme.weights == "int4" else codes)
        yield self.scales_name, 0, _bytes(scales)

    def _tensor_scale(self) -> Tensor:
        """Return the scale of the whole matrix, which takes a reading of its own."""
        largest = torch.zeros(())
        for source, _, _, values in self._rows():
            try:
                largest = torch.maximum(largest, amax(values))
            except NotFinite as error:
                raise _not_finite(source, error) from None
        return scale_of(largest, self.scheme.weights)

    def _rows(self) -> Iterator[tuple[StoredTensor, int, int, Tensor]]:
        """Yield the weights a few rows at a time, in fp32, scaled and smoothed, with their place in [N, K]."""
        offset = 0
        for source, scale in zip(self.sources, self.scales, strict=True):
            n, k = source.shape
            step = max(1, CHUNK_VALUES // k)
            for first in range(0, n, step):
                last = min(first + step, n)
                values = read_rows(source, first, last)
                begin, end = offset + first, offset + last
                if scale != 1.0:
                    values *= scale
                if self.columns is not None:
                    values *= self.columns
                if self.rows is not None:
                    values *= self.rows[begin:end, None]
                yield source, begin, end, values
            offset += n


def _not_finite(source: StoredTensor, error: NotFinite) -> ArtifactError:
    return ArtifactError(f"{source.file}: tensor {source.name!r} {error}; it cannot be quantized")


def read_rows(source: StoredTensor, begin: int, end: int) -> Tensor:
    """Read rows `begin` to `end` of a stored tensor as fp32."""
    return _read(source, begin, end).to(torch.float32)


def write(jobs: Sequence[Job], path: Path, progress: Progress = lambda done: None) -> dict[str, StoredTensor]:
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


def _read(source: StoredTensor, begin: int, end: int) -> Tensor:
    row_bytes = source.nbytes // source.shape[0]
    raw = bytearray((end - begin) * row_bytes)
    with source.file.open("rb", buffering=0) as stream:
        stream.seek(source.offset + begin * row_bytes)
        view = memoryview(raw)
        while view:
            count = stream.readinto(view)
            if not count:
                raise ArtifactError(f"{source.file}: ends within tensor {source.name!r}; the file is truncated")
            view = view[count:]
    return torch.frombuffer(raw, dtype=TORCH_TYPES[source.dtype]).view(end - begin, *source.shape[1:])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data.cast("B")
