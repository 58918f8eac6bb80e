"""Find numbers in tables of the docs that no result behind them has.

A section of a page names its results, such as `cpu_int8.json`. Every number in the section's tables must be a number of
one of them at the precision that is shown: as it is, in another power of a thousand, or as a percentage.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECTION = re.compile(r"^#{2,3} ", re.MULTILINE)
CITED = re.compile(r"`([\w-]+\.json)`")
NUMBER = re.compile(r"(?<![\w.*`/-])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?(?![\w`/.-]*\w)")
SCALES = (1.0, 1e3, 1e6, 1e9, 1e-3, 1e-6, 1e-9, 100.0)


@dataclass(frozen=True)
class Stray:
    """A number that no result has."""

    section: str
    row: str
    number: str

    def __str__(self) -> str:
        return f"{self.section}: {self.number} in {self.row!r}"


def strays(page: Path, results: Path) -> list[Stray]:
    """Return the numbers of a page's tables that the results of their sections do not have."""
    found = []
    for section in SECTION.split(page.read_text())[1:]:
        cited = [results / name for name in sorted(set(CITED.findall(section)))]
        known = [value for path in cited if path.is_file() for value in _numbers(json.loads(path.read_text()))]
        if not known:
            continue
        for row in _rows(section):
            for number in NUMBER.findall(row):
                if not _is_known(number, known):
                    found.append(Stray(section.partition("\n")[0], row, number))
    return found


def _rows(section: str) -> Iterator[str]:
    """Yield the cells of tables but headers and the first column, which say what is measured."""
    lines = [*section.split("\n"), ""]
    rules = {number for number, line in enumerate(lines) if line.startswith("|") and set(line) <= set("|- :")}
    for number, line in enumerate(lines):
        if line.startswith("|") and number not in rules and number + 1 not in rules:
            yield line.split("|", 2)[2]


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)
    elif isinstance(value, str):
        yield from (float(word.replace(",", "")) for word in NUMBER.findall(value))


def _is_known(text: str, known: list[float]) -> bool:
    """Return whether a number is one of the known at its own precision."""
    plain = text.replace(",", "")
    value = float(plain)
    mantissa, _, exponent = plain.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    step = 10.0 ** (int(exponent or 0) - decimals)
    return any(abs(one * scale - value) <= step * 0.501 for one in known for scale in SCALES)
