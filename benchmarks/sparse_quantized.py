"""Quantize artifacts of the published sizes without weights: real graphs, names and sizes, codes in sparse files.

For measurements of compilers, which see shapes and types but not values. The scales are real numbers, since a graph
with a scale of zero is invalid.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kit.artifact import read_manifest
from kit.ports import QUANTIZED_PARTS, PartName
from kit.recipes import Recipe
from kit.safetensors_file import StoredTensor
from kit.safetensors_writer import reserve
from quantize.apply.apply import apply
from quantize.calibration.record import Record, Seen, fingerprint
from quantize.conversions import HEADER_MULTIPLE, Conversion, Progress, slots_of
from quantize.linears import find_linears

SCALE = 2.0**-8


def quantize(artifact: Path, out: Path, recipe: Recipe) -> Path:
    """Quantize an exported artifact by a recipe; only headers and scales are written."""
    apply(artifact, out, recipe, synthetic_record(artifact), convert=_reserve)
    return out


def synthetic_record(artifact: Path) -> Record:
    """Make a calibration record from the names of layers, without arithmetic that depends on the CPU."""
    parts: dict[str, dict[str, Seen]] = {}
    present: Iterable[PartName] = [part for part in QUANTIZED_PARTS if part in read_manifest(artifact).parts]
    for part in present:
        folder = artifact / part
        for linear in find_linears(ir.load(folder / "model.onnx"), folder):
            draw = np.random.default_rng(zlib.crc32(linear.name.encode()))
            amax = np.round(draw.integers(64, 1024, linear.inputs) / 64, 6).astype(np.float32)
            amax[::37] *= 16
            parts.setdefault(part, {})[linear.name] = Seen(
                rows=1024,
                amax=float(amax.max()),
                amax_by_step=(float(amax.max()),),
                histogram={},
                channel_amax=amax,
                channel_square=(amax / 4) ** 2,
                weight=fingerprint(linear.weight),
                value_amax=8.0,
            )
    return Record("synthetic", ({"prompts": {"marks": []}},), parts)


def _reserve(jobs: Sequence[Conversion], path: Path, progress: Progress) -> dict[str, StoredTensor]:
    """Write the file of `quantize.conversions.convert` with holes in place of codes and kept weights."""
    places = reserve(path, slots_of(jobs), HEADER_MULTIPLE)
    with path.open("r+b") as stream:
        for name, place in places.items():
            if name.endswith(".scale"):
                stream.seek(place.offset)
                stream.write(np.full(place.nbytes // 4, SCALE, np.float32).tobytes())
    return places
