"""NVIDIA's table of the ONNX operators that TensorRT's parser supports, by operator and version.

Source of the table: operators.md of onnx-tensorrt at 7c51a63 (TensorRT 11.1). Remarks in [brackets] were added for this
kit and give the version that introduced an operator.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal, get_args

from kit.errors import UsageError

TensorRT = Literal["10.13", "10.16", "11.x"]
VERSIONS: tuple[TensorRT, ...] = get_args(TensorRT)
OPSETS = range(9, 25)  # as listed by operators.md of 10.15 to 11.2


@dataclass(frozen=True)
class Operator:
    """One row: whether an operator is supported, for which element types and since which version."""

    name: str
    supported: bool
    types: frozenset[str]  # FP32, BF16, INT64, ...
    restrictions: str
    since: tuple[int, int]


@cache
def table() -> Mapping[str, Operator]:
    """Read the packaged table, keyed by operator name; custom operators are named `trt::Name`."""
    text = (resources.files("export") / "data" / "tensorrt_operators.csv").read_text()
    return {row["op"]: _operator(row) for row in csv.DictReader(text.splitlines())}


def _operator(row: Mapping[str, str]) -> Operator:
    added = re.search(r"\[added in TRT (\d+)\.(\d+)", row["restrictions"])
    later = bool(added) and row["supported"] == "N"  # added after the version of the table
    return Operator(
        name=row["op"],
        supported=row["supported"] == "Y" or later,
        types=frozenset(row["types"].split()),
        restrictions=row["restrictions"],
        since=(int(added[1]), int(added[2])) if added else (0, 0),
    )


def release(version: TensorRT) -> tuple[int, int]:
    """Return the oldest release that a version represents: 11.x is 11.0."""
    major, minor = version.split(".")
    return int(major), 0 if minor == "x" else int(minor)


def parse_versions(text: str) -> tuple[TensorRT, ...]:
    """Parse "10.13,11.x"; raises UsageError for a version that the table does not cover."""
    chosen = []
    for word in text.split(","):
        match = next((v for v in VERSIONS if v == word.strip()), None)
        if match is None:
            raise UsageError(f"unknown TensorRT version {word.strip()!r}; there are: {', '.join(VERSIONS)}")
        chosen.append(match)
    return tuple(chosen)
