"""Read the public measurements (data/measurements.json) that the planner is fitted to and validated on.

The split was fixed before anything was fitted and does not depend on any figure: within each cell of GPU generation
and precision (16 or 8 bits), sources in alphabetical order are assigned alternately to the fit and to the held-out
set. A cell with only one source goes to the fit, because nothing else covers it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from kit.gpus import Generation
from kit.recipes import recipe
from planner.boards import board

Stack = Literal["eager", "fused", "tensorrt"]
EIGHT_BITS = "8 bits"
Scope = Literal["step", "image"]  # one transformer pass | text encoder, all steps and VAE


@dataclass(frozen=True)
class Measurement:
    """One published figure and the workload it was measured on."""

    id: str
    source: str
    model: str  # a variant, or flux1-dev
    gpu: str
    stack: Stack
    recipe: str
    width: int
    height: int
    steps: int
    scope: Scope
    seconds: float
    assumed: str = ""  # facts that the source does not state

    @property
    def cell(self) -> tuple[Generation, str]:
        """Return the cell by which the split is stratified."""
        return board(self.gpu).generation, EIGHT_BITS if recipe(self.recipe).math in ("fp8", "int8") else "16 bits"


def load() -> dict[str, Any]:
    """Read the data file: sources, points, and the points that were not used, with reasons."""
    text = resources.files("planner.data").joinpath("measurements.json").read_text()
    raw: dict[str, Any] = json.loads(text)
    return raw


def measurements() -> tuple[Measurement, ...]:
    """Return all points in the order of the file."""
    return tuple(Measurement(**point) for point in load()["points"])


@cache
def measured_cells() -> frozenset[tuple[Generation, str]]:
    """Return the cells that contain at least one point."""
    return frozenset(p.cell for p in measurements())


def split(points: Sequence[Measurement]) -> tuple[tuple[Measurement, ...], tuple[Measurement, ...]]:
    """Return (to fit, held out) by the rule in the module docstring."""
    held: set[str] = set()
    for cell in {p.cell for p in points}:
        sources = sorted({p.source for p in points if p.cell == cell}, key=str.lower)
        held |= {p.id for p in points if p.cell == cell and p.source in sources[1::2]}
    return tuple(p for p in points if p.id not in held), tuple(p for p in points if p.id in held)
