"""Run the search: build the ladder, generate images with some rungs, find the cheapest that meets the bounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kit.recipes import Rule
from quantize.gate.contract import Bound
from quantize.search.groups import Key, rules
from quantize.search.ladder import Problem, Rung, climb, spread
from quantize.search.order import Alone, others, pick, rank_correlation, squared_error
from quantize.search.points import Measured, bisect
from quantize.search.sensitivity import Effect, State

Draw = Callable[[str, tuple[Rule, ...]], Measured]  # takes a name and the rules that spare layers


@dataclass(frozen=True)
class Point:
    """A rung whose images were measured."""

    name: str  # name of its recipe
    rung: Rung
    measured: Measured


@dataclass(frozen=True)
class Found:
    """The result of a search; `chosen` is None without bounds, or if only the unquantized model meets them."""

    problem: Problem
    effects: dict[tuple[Key, State], Effect]
    rungs: list[Rung]
    points: list[Point]
    chosen: Point | None
    alone: list[Alone]

    @property
    def correlations(self) -> dict[str, float | None]:
        """Return the rank correlation of each prediction with each measurement of groups quantized alone."""
        return {
            f"{guess}, {truth}": rank_correlation(
                [getattr(one, guess) for one in self.alone], [getattr(one, truth) for one in self.alone]
            )
            for guess in ("predicted", "local")
            for truth in ("latents", "images")
        }


@dataclass
class Search:
    """The problem, and the function that measures a rung."""

    problem: Problem
    effects: dict[tuple[Key, State], Effect]
    base: str  # recipe
    spare: str  # scheme, or "keep"
    draw: Draw
    points: int
    bounds: Sequence[Bound]
    alone: int = 0

    def run(self) -> Found:
        """Measure the points, bisect between those that meet and miss the bounds, then measure groups alone."""
        rungs = climb(self.problem)
        drawn: dict[int, Point] = {}

        def point(index: int) -> Point:
            if index not in drawn:
                name = f"{self.base}-spare-{len(rungs[index].spared)}"
                drawn[index] = Point(name, rungs[index], self.draw(name, self._rules(rungs[index].set)))
            return drawn[index]

        def meets(index: int) -> bool:
            return not point(index).measured.faults(self.bounds)

        for index in spread(rungs, self.points):
            point(index)
        chosen = None
        last = len(rungs) - 1
        if self.bounds:
            keeping = [index for index in sorted(drawn) if meets(index)]
            if keeping:
                high = keeping[0]
                low = max((index for index in drawn if index < high), default=-1)
                chosen = bisect(low, high, meets)
            if chosen == last and self.spare == "keep":
                chosen = None  # at this rung nothing is quantized
        return Found(
            self.problem,
            self.effects,
            rungs,
            [drawn[index] for index in sorted(drawn)],
            None if chosen is None else drawn[chosen],
            [self._alone(key) for key in (pick(self.problem, self.alone) if self.alone else ())],
        )

    def most_drawings(self) -> int:
        """Return the maximum number of recipes to measure: points, a bisection between two of them, groups alone."""
        rungs = 1 + sum(group.cost(self.problem.cost) > 0 for group in self.problem.groups.values())
        points = min(self.points, rungs)
        gap = rungs / max(1, points - 1)
        return points + (math.ceil(math.log2(max(1, gap))) if self.bounds else 0) + min(self.alone, rungs - 1)

    def _alone(self, key: Key) -> Alone:
        spared = others(self.problem, key)
        measured = self.draw(f"{self.base}-alone", rules(self.problem.groups, spared, self.spare))
        return Alone(
            key,
            self.problem.predict(spared),
            self.effects[key, self._state(key)].local,
            measured.latents,
            squared_error(measured.metrics["psnr"].mean),
        )

    def _state(self, key: Key) -> State:
        bare = (key, "unsmoothed") in self.effects and self.problem.unsmooths
        return "unsmoothed" if bare else "quantized"

    def _rules(self, spared: frozenset[Key]) -> tuple[Rule, ...]:
        return rules(self.problem.groups, spared, self.spare)
