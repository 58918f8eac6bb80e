"""The calibration record: statistics of the input of every linear layer, in one portable JSON file.

It is enough to choose scales, percentiles and SmoothQuant factors later, without the model: per layer the largest
magnitude (overall and per step) and a histogram of magnitudes, per channel the largest magnitude and the mean square.
Records of different prompts can be merged. A fingerprint of each layer's weight ties a record to its checkpoint.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kit.atomic_file import write_file
from kit.errors import UsageError
from kit.safetensors_file import StoredTensor

FORMAT = 1
PER_OCTAVE = 16  # histogram bins per doubling of the magnitude: percentiles are accurate to 4.4 %
PRINT_BYTES = 4096  # bytes of a weight that go into its fingerprint
Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Seen:
    """Statistics of the input [rows, K] of one layer."""

    rows: int
    amax: float
    amax_by_step: tuple[float, ...]
    histogram: Mapping[int, int]  # floor(log2|x| * PER_OCTAVE) -> count; zeros are left out
    channel_amax: Float32  # [K]
    channel_square: Float32  # [K], mean of x^2
    weight: str  # fingerprint
    value_amax: float = 0.0  # largest magnitude of the outputs that attention reads as values; 0 where not seen

    def percentile(self, percent: float) -> float:
        """Return a magnitude that `percent` of all values do not exceed; 100 returns the largest one."""
        if percent >= 100:
            return self.amax
        total = self.rows * len(self.channel_amax)
        above = total * (1 - percent / 100)
        for bin_, count in sorted(self.histogram.items(), reverse=True):
            above -= count
            if above < 0:
                return min(self.amax, float(2 ** ((bin_ + 1) / PER_OCTAVE)))
        return self.amax


@dataclass(frozen=True)
class Record:
    """The statistics of all calibrated layers, and the runs they come from."""

    variant: str
    runs: tuple[Mapping[str, Any], ...]  # prompts' digest and count, steps, seeds, size, versions, adapters
    parts: Mapping[str, Mapping[str, Seen]]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(_plain(self), sort_keys=True).encode()).hexdigest()

    @property
    def marks(self) -> list[str]:
        """Return the marks of all prompts that were run, sorted; older records have none."""
        return sorted({mark for run in self.runs for mark in run.get("prompts", {}).get("marks", ())})


def fingerprint(weight: StoredTensor) -> str:
    """Digest the shape, type and first values of a stored weight; bf16 and fp32 copies of a weight differ."""
    with weight.file.open("rb") as stream:
        stream.seek(weight.offset)
        head = stream.read(min(PRINT_BYTES, weight.nbytes))
    return hashlib.sha256(f"{list(weight.shape)}{weight.dtype}".encode() + head).hexdigest()[:16]


def merge(records: Sequence[Record], names: Sequence[str] = ()) -> Record:
    """Merge records of one checkpoint; `names` are those of their files, for messages.

    Raises UsageError if they are of different checkpoints, or if two contain the same run of the same layers.
    """
    first = records[0]
    parts: dict[str, dict[str, Seen]] = {part: dict(layers) for part, layers in first.parts.items()}
    for other in records[1:]:
        if other.variant != first.variant:
            raise UsageError(f"cannot merge a record of {other.variant} into one of {first.variant}")
        for part, layers in other.parts.items():
            mine = parts.setdefault(part, {})
            for name, seen in layers.items():
                mine[name] = _merge_seen(name, mine[name], seen) if name in mine else seen
    _check_runs(records, names or [f"record {number}" for number in range(1, len(records) + 1)])
    return Record(first.variant, tuple(run for record in records for run in record.runs), parts)


def _check_runs(records: Sequence[Record], names: Sequence[str]) -> None:
    """Reject records that share a run: its images would count twice."""
    for (name, record), (other, later) in combinations(zip(names, records, strict=True), 2):
        layers = {(part, layer) for part, found in record.parts.items() for layer in found}
        shared = any((part, layer) in layers for part, found in later.parts.items() for layer in found)
        if shared and any(run in record.runs for run in later.runs):
            raise UsageError(f"{name} and {other} contain the same run, whose images would count twice; leave one out")


def _merge_seen(name: str, a: Seen, b: Seen) -> Seen:
    if a.weight != b.weight:
        raise UsageError(
            f"cannot merge records of different weights: {name} differs; all must come from one checkpoint"
        )
    rows = a.rows + b.rows
    return Seen(
        rows=rows,
        amax=max(a.amax, b.amax),
        amax_by_step=tuple(max(pair) for pair in zip_longest(a.amax_by_step, b.amax_by_step, fillvalue=0.0)),
        histogram=dict(Counter(a.histogram) + Counter(b.histogram)),
        channel_amax=np.maximum(a.channel_amax, b.channel_amax),
        channel_square=((a.channel_square * a.rows + b.channel_square * b.rows) / rows).astype(np.float32),
        weight=a.weight,
        value_amax=max(a.value_amax, b.value_amax),
    )


def check(name: str, seen: Seen, where: str) -> None:
    """Raise UsageError for statistics that no scale can be computed from: NaN, infinity or only zeros."""
    if not math.isfinite(seen.amax) or not np.isfinite(seen.channel_amax).all():
        raise UsageError(
            f"{where}: the input of {name} has a value that is not finite (amax {seen.amax}); the model overflowed "
            f"during calibration: calibrate again with --dtype bf16 or fp32"
        )
    if seen.amax <= 0:
        raise UsageError(
            f"{where}: the input of {name} was always zero (amax {seen.amax}), so it has no scale; calibrate with more "
            f"prompts, or keep the layer in high precision with a rule of the recipe"
        )


def write(record: Record, path: Path) -> None:
    """Write a record; it appears at `path` only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, json.dumps(_plain(record)) + "\n")


def check_replaceable(path: Path) -> None:
    """Raise UsageError if `path` is an existing file that is not a calibration record."""
    if path.exists():
        try:
            read(path)
        except UsageError:
            raise UsageError(f"--out {path} exists and is not a calibration record; choose another --out") from None


def read(path: Path) -> Record:
    """Read a record; raises UsageError, naming the file, if it is not one."""
    try:
        raw = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"calibration record {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"calibration record {path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise UsageError(f"calibration record {path}: not a record of format {FORMAT}; calibrate again")
    try:
        parts = {
            part: {name: _seen_from(entry) for name, entry in layers.items()} for part, layers in raw["parts"].items()
        }
        return Record(raw["variant"], tuple(raw["runs"]), parts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"calibration record {path}: malformed ({error!r}); calibrate again") from None


def _plain(record: Record) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "variant": record.variant,
        "runs": list(record.runs),
        "parts": {
            part: {name: _seen_to(seen) for name, seen in layers.items()} for part, layers in record.parts.items()
        },
    }


def _seen_to(seen: Seen) -> dict[str, Any]:
    return {
        "rows": seen.rows,
        "amax": seen.amax,
        "amax_by_step": list(seen.amax_by_step),
        "percentiles": {str(p): seen.percentile(p) for p in (99.0, 99.9, 99.99, 99.999)},  # for readers of the file
        "histogram": [[bin_, seen.histogram[bin_]] for bin_ in sorted(seen.histogram)],
        "channel_amax": _pack(seen.channel_amax),
        "channel_square": _pack(seen.channel_square),
        "weight": seen.weight,
        **({"value_amax": seen.value_amax} if seen.value_amax else {}),
    }


def _seen_from(raw: Mapping[str, Any]) -> Seen:
    seen = Seen(
        rows=raw["rows"],
        amax=float(raw["amax"]),
        amax_by_step=tuple(raw["amax_by_step"]),
        histogram=_histogram(raw["histogram"]),
        channel_amax=_unpack(raw["channel_amax"]),
        channel_square=_unpack(raw["channel_square"]),
        weight=raw["weight"],
        value_amax=float(raw.get("value_amax", 0.0)),
    )
    if seen.channel_amax.shape != seen.channel_square.shape:
        raise ValueError("channel statistics of different lengths")
    return seen


def _histogram(pairs: Iterable[Sequence[int]]) -> dict[int, int]:
    return {int(bin_): int(count) for bin_, count in pairs}


def _pack(values: Float32) -> str:
    return base64.b64encode(values.astype("<f4").tobytes()).decode()


def _unpack(text: str) -> Float32:
    return np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
