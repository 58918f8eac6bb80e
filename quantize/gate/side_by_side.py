"""Compare two reports of the gate: their settings, the difference of every metric, and the tolerance that was stated.

Two machines give slightly different images of the same artifact, because ONNX Runtime chooses its kernels by the CPU's
instruction sets; two sets of calibration prompts give different scales. The tolerances were measured on the sample in
int8 (docs/quantization.md): what exceeds them has another cause, which is a fault until it is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kit.errors import UsageError
from quantize.gate.metrics import METRICS
from quantize.gate.report import REPORT

MACHINES = 0.5  # dB of the mean PSNR between machines, with equal commands
CALIBRATIONS = 1.0  # dB of the mean PSNR between two sets of 64 calibration prompts
TOLERATED = "psnr"  # the metric that has a stated tolerance
SAME = ("prompts", "seeds", "canvas")  # without which no difference of two reports means anything
SETTINGS = ("candidate", "reference", "runtime", "cpu", "system", "versions", "date")
Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Difference:
    """One metric of both reports."""

    metric: str
    first: tuple[float, float, float]  # mean and 95 % interval
    second: tuple[float, float, float]
    tolerance: float | None  # None: none is stated

    @property
    def change(self) -> float:
        return self.second[0] - self.first[0]

    @property
    def overlap(self) -> bool:
        """Return whether the intervals have a value in common."""
        return self.first[1] <= self.second[2] and self.second[1] <= self.first[2]

    @property
    def kept(self) -> bool:
        return self.tolerance is None or abs(self.change) <= self.tolerance

    def facts(self) -> dict[str, Any]:
        return {**asdict(self), "change": round(self.change, 6), "overlap": self.overlap, "kept": self.kept}


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side."""

    differences: tuple[Difference, ...]
    settings: Mapping[str, tuple[str, str]]  # those that differ

    @property
    def kept(self) -> bool:
        return all(difference.kept for difference in self.differences)


def read(path: Path) -> Facts:
    """Read a report, or that of a folder; raises UsageError if it is not one."""
    file = path / REPORT if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file}: not a report of the gate ({error})") from None
    if not isinstance(found, dict) or not isinstance(found.get("metrics"), dict) or not set(SAME) <= found.keys():
        raise UsageError(f"{file}: not a report of the gate; `quantize gate --out DIR` writes {REPORT}")
    return found


def compare(first: Facts, second: Facts) -> Comparison:
    """Compare two reports; raises UsageError for reports on other prompts, seeds or sizes."""
    for key in SAME:
        if first[key] != second[key]:
            one, other = (_shown(key, report[key]) for report in (first, second))
            raise UsageError(f"the reports have different {key}, {one} and {other}, so they cannot be compared")
    common = [name for name in METRICS if name in first["metrics"] and name in second["metrics"]]
    calibrations = {str(known) for report in (first, second) if (known := _calibration(report)) is not None}
    tolerance = CALIBRATIONS if len(calibrations) == 2 else MACHINES
    differences = tuple(
        Difference(name, _ends(first, name), _ends(second, name), tolerance if name == TOLERATED else None)
        for name in common
    )
    both = {key: (_shown(key, first.get(key)), _shown(key, second.get(key))) for key in SETTINGS}
    return Comparison(differences, {key: shown for key, shown in both.items() if shown[0] != shown[1]})


def table(found: Comparison) -> str:
    """Render both reports as text."""
    lines = [f"{key}: {one} | {other}" for key, (one, other) in found.settings.items()]
    lines.append(f"{'metric':<20}{'A':<34}{'B':<34}{'B - A':>10}  tolerance")
    for row in found.differences:
        digits = METRICS[row.metric].digits
        verdict = "intervals overlap" if row.overlap else "intervals apart"
        if row.tolerance is not None:
            verdict = f"{row.tolerance:g}, {'kept' if row.kept else 'exceeded'}; {verdict}"
        lines.append(
            f"{row.metric:<20}{_span(row.first, digits):<34}{_span(row.second, digits):<34}"
            f"{row.change:>+10.{digits}f}  {verdict}"
        )
    return "\n".join(lines)


def _span(ends: tuple[float, float, float], digits: int) -> str:
    return "{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*ends, d=digits)


def _ends(report: Facts, name: str) -> tuple[float, float, float]:
    row = report["metrics"][name]
    return row["mean"], row["low"], row["high"]


def _calibration(report: Facts) -> Any:
    return report.get("candidate", {}).get("calibrated_on")


def _shown(key: str, value: Any) -> str:
    """Show one setting in a few words."""
    if key == "cpu" and isinstance(value, dict):
        return f"{value.get('name')}, {value.get('cores')} cores, {' '.join(value.get('features', ()))}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(name, inner)}" for name, inner in value.items() if inner is not None)
    return "not stated" if value is None else str(value)
