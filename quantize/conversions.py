"""Convert weights for a quantized file: copy them or quantize them to codes and scales, a few rows at a time.

Memory does not grow with the model. Pieces are computed on all cores and written while the next ones are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kit import safetensors_writer
from kit.dtypes import ITEM_BYTES, torch_type
from kit.errors import ArtifactError
from kit.recipes import Scheme
from kit.safetensors_file import StoredTensor
from kit.safetensors_writer import Piece, Slot
from quantize.row_reader import Workspace, one_thread_per_core, read_rows
from quantize.scales import NotFinite, amax, encode, pack_int4, scale_of

CHUNK_VALUES = 1 << 19  # fp32 values of a weight at once: they fit the private caches of a core
HEADER_MULTIPLE = 64
Progress = Callable[[int], None]  # receives how many more bytes of the source are done


class Conversion(Protocol):
    """A conversion of source tensors to one or two tensors of the new file."""

    @property
    def slots(self) -> tuple[Slot, ...]: ...

    @property
    def source_bytes(self) -> int: ...

    def run(self, progress: Progress) -> Iterator[Piece]:
        """Yield pieces of the new tensors."""
        ...


@dataclass(frozen=True)
class Kept:
    """A tensor that is copied, or multiplied by a factor per column, in its original type."""

    source: StoredTensor
    factors: Tensor | None = None  # [last axis], powers of two: nothing is rounded

    @property
    def slots(self) -> tuple[Slot, ...]:
        return (Slot(self.source.name, self.source.dtype, self.source.shape),)

    @property
    def source_bytes(self) -> int:
        return self.source.nbytes

    def run(self, progress: Progress) -> Iterator[Piece]:
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
    """Weights [N_i, K] that become one matrix of codes [K, N], the layout of ONNX's MatMul, and scales.

    Several weights are joined if their layers have the same input, so that one product computes them all. The scales
    have shape [] per tensor, [N] per channel, [K / block, N] per block. Two codes of int4 are packed into a byte along
    N. `columns` [K] and `rows` [N] multiply the weights before they are quantized (SmoothQuant); `scales` are those of
    sources stored in FP8. With `round_scales`, new scales are rounded to bf16 before anything is divided by them, so
    that a bf16 and an fp32 graph can use the same codes and scales.
    """

    sources: tuple[StoredTensor, ...]
    scheme: Scheme
    scales: tuple[float, ...]
    columns: Tensor | None = None
    rows: Tensor | None = None
    round_scales: bool = False

    @property
    def name(self) -> str:
        """Return the base name of the new tensors, after the first source."""
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

    def run(self, progress: Progress) -> Iterator[Piece]:
        n, k = self.shape
        scales = torch.empty(self.scales_shape)
        fp8 = self.scheme.weights == "fp8"
        codes = torch.empty((k, n), dtype=torch.uint8 if fp8 else torch.int8)
        with one_thread_per_core() as workers:
            if self.scheme.granularity == "tensor":  # one scale for all: read everything twice
                largest = torch.stack(list(workers.map(self._amax, self._pieces()))).max()
                scales.copy_(self._scale(largest))

            def encode_piece(piece: _Piece) -> int:
                made = self._encode(piece, scales)
                codes[:, piece.begin : piece.end] = (made.view(torch.uint8) if fp8 else made).t().contiguous()
                return (piece.end - piece.begin) * k * ITEM_BYTES[piece.source.dtype]

            for done in workers.map(encode_piece, self._pieces()):
                progress(done)
        yield self.codes_name, 0, _bytes(pack_int4(codes) if self.scheme.weights == "int4" else codes)
        yield self.scales_name, 0, _bytes(scales)

    def _scale(self, largest: Tensor) -> Tensor:
        """Return the scale of values up to `largest`, as it will be stored."""
        scale = scale_of(largest, self.scheme.weights)
        return scale.bfloat16().float() if self.round_scales else scale

    def _amax(self, piece: _Piece) -> Tensor:
        try:
            return amax(self._values(piece), scratch=_workspace.magnitudes)
        except NotFinite as error:
            raise _not_finite(piece.source, error) from None

    def _encode(self, piece: _Piece, scales: Tensor) -> Tensor:
        """Return the codes [rows, K] of a piece; scales per channel or block are stored in `scales`."""
        values, number = self._values(piece), self.scheme.weights
        rows, k = values.shape
        try:
            match self.scheme.granularity:
                case "tensor":
                    return encode(values, scales, number)
                case "channel":
                    scale = self._scale(amax(values, 1, _workspace.magnitudes))
                    scales[piece.begin : piece.end] = scale
                    return encode(values, scale[:, None], number)
                case "block":
                    blocks = values.view(rows, k // self.scheme.block, self.scheme.block)
                    scale = self._scale(amax(blocks, 2, _workspace.magnitudes))
                    scales[:, piece.begin : piece.end] = scale.T
                    return encode(blocks, scale[:, :, None], number).view(rows, k)
        except NotFinite as error:
            raise _not_finite(piece.source, error) from None

    def _pieces(self) -> Iterator[_Piece]:
        """Split the weights into pieces of a few rows."""
        offset = 0
        for source, scale in zip(self.sources, self.scales, strict=True):
            n, k = source.shape
            step = max(1, CHUNK_VALUES // k)
            for first in range(0, n, step):
                last = min(first + step, n)
                yield _Piece(source, scale, first, last, offset + first)
            offset += n

    def _values(self, piece: _Piece) -> Tensor:
        """Read a piece in fp32, scaled and smoothed; the result is valid until the thread reads its next piece."""
        values = read_rows(piece.source, piece.first, piece.last, _workspace)
        if piece.scale != 1.0:
            values *= piece.scale
        if self.columns is not None:
            values *= self.columns
        if self.rows is not None:
            values *= self.rows[piece.begin : piece.end, None]
        return values


@dataclass(frozen=True)
class _Piece:
    """Rows `first` to `last` of one source, which begin at row `begin` of the joined matrix."""

    source: StoredTensor
    scale: float
    first: int
    last: int
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.last - self.first


_workspace = Workspace()


def _not_finite(source: StoredTensor, error: NotFinite) -> ArtifactError:
    return ArtifactError(f"{source.file}: tensor {source.name!r} {error}; it cannot be quantized")


def convert(jobs: Sequence[Conversion], path: Path, progress: Progress = lambda done: None) -> dict[str, StoredTensor]:
    """Write the results of conversions to a safetensors file and return where each tensor is."""
    pieces = (piece for job in jobs for piece in job.run(progress))
    return safetensors_writer.write(path, slots_of(jobs), pieces, HEADER_MULTIPLE)


Convert = Callable[[Sequence[Conversion], Path, Progress], dict[str, StoredTensor]]  # `convert`, or another writer


def slots_of(jobs: Sequence[Conversion]) -> list[Slot]:
    """Return the tensors of a file in its order: wide items first, so that every tensor is aligned to its items."""
    return sorted((slot for job in jobs for slot in job.slots), key=lambda slot: -ITEM_BYTES[slot.dtype])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data.cast("B")
