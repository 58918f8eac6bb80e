"""Which groups to spare: a ladder of nested choices, each the cheapest for the error that it is predicted to have.

Effects add up and costs add up, so this is a knapsack. Taking groups by effect saved per cost gives its Pareto front's
convex hull: every rung is an exact optimum (no choice of the same cost has a smaller error), and between two rungs lies
one group, a few per cent of the whole, less than what the prediction itself is worth. Rungs are nested, so that one
ranking explains every recipe, and bisection over measured rungs is meaningful; an exact knapsack between rungs is
neither. Sparing a group can cost another its smoothing, so a group is also offered together with those it smooths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantize.search.groups import Cost, Group, Key
from quantize.search.sensitivity import State


@dataclass(frozen=True)
class Problem:
    """Groups, what each state of each does to the final latents, and what sparing costs."""

    groups: Mapping[Key, Group]
    effects: Mapping[tuple[Key, State], float]
    cost: Cost
    unsmooths: bool  # whether a spared group takes the smoothing of those that it makes
    made_by: Mapping[Key, tuple[Key, ...]] = field(init=False)  # group -> the groups that it smooths

    def __post_init__(self) -> None:
        made: dict[Key, list[Key]] = {}
        for key, group in self.groups.items():
            for maker in group.makers if group.smoothed and self.unsmooths else ():
                made.setdefault((group.part, maker), []).append(key)
        object.__setattr__(self, "made_by", {key: tuple(keys) for key, keys in made.items()})

    @property
    def total(self) -> float:
        return sum(group.cost(self.cost) for group in self.groups.values())

    def effect(self, key: Key, spared: frozenset[Key]) -> float:
        """Return what one group adds to the error when `spared` are spared."""
        if key in spared:
            return self.effects.get((key, "spared"), 0.0)
        group = self.groups[key]
        bare = self.unsmooths and any((group.part, maker) in spared for maker in group.makers)
        if bare and (key, "unsmoothed") in self.effects:
            return self.effects[key, "unsmoothed"]
        return self.effects[key, "quantized"]

    def predict(self, spared: frozenset[Key]) -> float:
        """Return the relative squared error of the final latents."""
        return sum(self.effect(key, spared) for key in self.groups)

    def spent(self, spared: frozenset[Key]) -> float:
        """Return the cost of sparing as a share of the cost of sparing all."""
        return sum(self.groups[key].cost(self.cost) for key in spared) / self.total


@dataclass(frozen=True)
class Rung:
    """One choice: what is spared, in the order of the ladder; its share of the whole cost, its predicted error."""

    spared: tuple[Key, ...]
    cost: float
    predicted: float

    @property
    def set(self) -> frozenset[Key]:
        return frozenset(self.spared)


def climb(problem: Problem) -> list[Rung]:
    """Return the rungs from nothing spared to everything that costs anything."""
    open_ = {key for key, group in problem.groups.items() if group.cost(problem.cost) > 0}
    spared: tuple[Key, ...] = ()
    rungs = [_rung(problem, spared)]
    while open_:
        here = frozenset(spared)
        offers: list[tuple[float, tuple[Key, ...]]] = []
        for key in sorted(open_):
            smoothed = tuple(other for other in problem.made_by.get(key, ()) if other in open_)
            for offer in {(key,), (key, *smoothed)}:
                offers.append((_worth(problem, here, offer), offer))
        best = max(offers, key=lambda offer: (offer[0], -len(offer[1])))[1]
        spared += best
        open_ -= set(best)
        rungs.append(_rung(problem, spared))
    return rungs


def spread(rungs: list[Rung], count: int) -> list[int]:
    """Choose `count` rungs, both ends among them, whose costs are evenly apart as far as the ladder allows."""
    chosen = {0, len(rungs) - 1}
    for turn in range(1, count - 1):
        aim = rungs[0].cost + (rungs[-1].cost - rungs[0].cost) * turn / (count - 1)
        free = [index for index in range(len(rungs)) if index not in chosen]
        if free:
            chosen.add(min(free, key=lambda index: abs(rungs[index].cost - aim)))
    return sorted(chosen)


def _worth(problem: Problem, spared: frozenset[Key], offer: tuple[Key, ...]) -> float:
    """Return the error that an offer saves per cost."""
    after = spared | set(offer)
    touched = set(offer).union(*(problem.made_by.get(key, ()) for key in offer))
    saved = sum(problem.effect(key, spared) - problem.effect(key, after) for key in touched)
    return saved / sum(problem.groups[key].cost(problem.cost) for key in offer)


def _rung(problem: Problem, spared: tuple[Key, ...]) -> Rung:
    here = frozenset(spared)
    return Rung(spared, problem.spent(here), problem.predict(here))
