"""Two results of one benchmark beside each other: what changed, and what is noise.

Every number of the two JSON files is compared with that of the same name. Where a benchmark kept its samples, a list of
numbers or one number of each round, the ratio of the medians has a 95 % interval by bootstrap (percentiles, resampled
independently in both files). A change counts only if the whole interval lies beyond the tolerance; where it lies on
both sides of it, more samples are needed to tell. Single numbers are shown without a verdict, because one value says
nothing of its noise. Units decide which direction is better; numbers without a known one are left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kit.errors import CheckFailed, UsageError

Verdict = Literal["better", "worse", "same", "unclear", ""]
Values = Mapping[str, list[float]]  # by the path of names in the file; one value if the file has no samples
FEWEST = 3  # samples that say something of their noise
RESAMPLES = 9999
SEED = 0
CONFIDENCE = 0.95
FASTER = re.compile(r"(per_second|per_minute|throughput|images_per|psnr|ssim|hit|goodput|speedup|ratio_to|share_of)")
SLOWER = re.compile(r"(seconds|_ms$|_us$|milliseconds|latency|bytes|_mb\b|_gb\b|memory|cost|dollars|error|p50|p95|p99)")
MACHINE = ("cpu", "cores", "gpu", "device")


@dataclass(frozen=True)
class Comparison:
    """One number of both files: `ratio` is new / old, with its interval where both files have samples."""

    name: str
    old: float
    new: float
    ratio: float
    low: float | None
    high: float | None
    samples: tuple[int, int]
    verdict: Verdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("old", type=Path, metavar="A.json", help="a result of a benchmark, from --save or --json")
    parser.add_argument("new", type=Path, metavar="B.json", help="a later result of the same benchmark")
    parser.add_argument(
        "--tolerance", type=float, default=0.03, metavar="SHARE", help="relative changes up to this count as none"
    )
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="compare names that match, such as '*int8*' (default: all)"
    )
    parser.add_argument("--any-machine", action="store_true", help="compare results of different machines anyway")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare two files; raises CheckFailed if something became worse, so that CI stops."""
    if not 0 <= args.tolerance < 1:
        raise UsageError(f"--tolerance {args.tolerance:g}: must be at least 0 and less than 1")
    old, new = read(args.old), read(args.new)
    if not args.any_machine and (difference := other_machine(old, new)):
        raise UsageError(f"{difference}, so their times cannot be compared; --any-machine compares them anyway")
    found = [c for c in compare(old, new, args.tolerance) if fnmatch.fnmatch(c.name, args.only)]
    if not found:
        raise UsageError(f"{args.old} and {args.new} have no number in common that matches {args.only!r}")
    facts = {"tolerance": args.tolerance, "comparisons": [asdict(comparison) for comparison in found]}
    if worse := [comparison.name for comparison in found if comparison.verdict == "worse"]:
        if not args.json:
            print(table(facts))
        raise CheckFailed(f"{len(worse)} of {len(found)} became worse: {', '.join(worse[:5])}")
    return facts


def table(facts: dict[str, Any]) -> str:
    """Format the comparisons as lines of text, those with a verdict first."""
    rows = sorted(facts["comparisons"], key=lambda row: (not row["verdict"], -abs(math.log(row["ratio"]))))
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'':{width}}  {'A':>10}  {'B':>10}  {'B / A':>6}  {'95 % interval':>15}  {'samples':>9}  verdict"]
    for row in rows:
        interval = f"{row['low']:.3f} - {row['high']:.3f}" if row["low"] is not None else ""
        count = f"{row['samples'][0]}, {row['samples'][1]}"
        lines.append(
            f"{row['name']:{width}}  {row['old']:10.4g}  {row['new']:10.4g}  {row['ratio']:6.3f}  {interval:>15}  "
            f"{count:>9}  {row['verdict'] or '(one value)'}"
        )
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    """Read a result; raises UsageError if the file is none."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a result of a benchmark ({error})") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path}: not a result of a benchmark: the JSON is not an object")
    return found


def other_machine(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return how the machines of two results differ; empty if they do not, or if a file does not say."""
    machines = [result.get("machine") for result in (old, new)]
    if not all(isinstance(machine, dict) for machine in machines):
        return ""
    for key in MACHINE:
        before, after = (machine.get(key) for machine in machines if machine is not None)
        if before != after:
            return f"the files are from different machines: {key} {before} and {after}"
    return ""


def compare(old: Mapping[str, Any], new: Mapping[str, Any], tolerance: float) -> list[Comparison]:
    """Compare all numbers that both results have and whose better direction is known."""
    before, after = values(old), values(new)
    found = []
    for name in before:
        direction = better(name)
        if name in after and direction is not None:
            found.append(_compare(name, before[name], after[name], direction, tolerance))
    return found


def values(result: Any) -> Values:
    """Return the positive numbers of a result by name; lists of numbers and of equal records are samples."""
    found: dict[str, list[float]] = {}
    for name, value in _walk(result, ""):
        found.setdefault(name, []).append(value)
    return found


def better(name: str) -> Literal["lower", "higher"] | None:
    """Return which direction of a number is better, by the unit at the end of its name; None if it has none."""
    for word in reversed(name.split("/")):
        if FASTER.search(word):
            return "higher"
        if SLOWER.search(word):
            return "lower"
    return None


def _walk(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key != "machine":
                yield from _walk(inner, f"{name}/{key}" if name else str(key))
    elif isinstance(value, list):
        alike = all(isinstance(item, dict) for item in value) and len({tuple(item) for item in value}) == 1
        numbers = all(_is_number(item) for item in value)
        for index, item in enumerate(value):
            yield from _walk(item, name if alike or numbers else f"{name}/{index}")
    elif _is_number(value) and value > 0 and math.isfinite(value):
        yield name, float(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _compare(
    name: str, old: Sequence[float], new: Sequence[float], direction: Literal["lower", "higher"], tolerance: float
) -> Comparison:
    before, after = float(np.median(old)), float(np.median(new))
    samples = (len(old), len(new))
    if min(samples) < FEWEST:
        return Comparison(name, before, after, after / before, None, None, samples, "")
    low, high = interval(old, new)
    return Comparison(name, before, after, after / before, low, high, samples, judge(low, high, direction, tolerance))


def interval(old: Sequence[float], new: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the ratio of medians, new / old."""
    if len(set(old)) == 1 and len(set(new)) == 1:
        return new[0] / old[0], new[0] / old[0]
    from scipy.stats import bootstrap

    def ratio(new: Any, old: Any, axis: int) -> Any:
        return np.median(new, axis=axis) / np.median(old, axis=axis)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # samples that hardly vary
        found = bootstrap(
            (np.asarray(new), np.asarray(old)),
            ratio,
            n_resamples=RESAMPLES,
            confidence_level=CONFIDENCE,
            method="percentile",
            rng=np.random.default_rng(SEED),
        ).confidence_interval
    return float(found.low), float(found.high)


def judge(low: float, high: float, direction: Literal["lower", "higher"], tolerance: float) -> Verdict:
    """Return what an interval of new / old says."""
    up, down = low > 1 + tolerance, high < 1 - tolerance
    if up or down:
        return "better" if up == (direction == "higher") else "worse"
    return "same" if low >= 1 - tolerance and high <= 1 + tolerance else "unclear"
