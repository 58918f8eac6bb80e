"""Choose the groups to spare: a ladder of nested choices, each the cheapest for its predicted error.

Effects and costs are additive, so this is a knapsack problem. Taking groups by effect saved per cost gives the convex
hull of its Pareto front: every rung is an exact optimum (no choice of the same cost has a smaller error), and two rungs
differ by one group, a few per cent of the whole, which is less than the accuracy of the prediction. Rungs are nested,
so one ranking explains every recipe and measured rungs can be bisected; the exact solutions between rungs are not
nested. Sparing a group can remove the smoothing of another, so a group is also considered together with those it
smooths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantize.search.groups import Cost, Group, Key
from quantize.search.sensitivity import State


@dataclass(frozen=True)
class Problem:
    """The groups, the effect of each of their states on the final latents, and the cost of sparing them."""

    groups: Mapping[Key, Group]
    effects: Mapping[tuple[Key, State], float]
    cost: Cost
    unsmooths: bool  # whether sparing a group removes the smoothing of the groups it smooths
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
        """Return the contribution of one group to the error if `spared` are spared."""
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
        """Return the cost of sparing, relative to the cost of sparing all groups."""
        return sum(self.groups[key].cost(self.cost) for key in spared) / self.total


@dataclass(frozen=True)
class Rung:
    """One choice: the spared groups in order, their share of the whole cost, and the predicted error."""

    spared: tuple[Key, ...]
    cost: float
    predicted: float

    @property
    def set(self) -> frozenset[Key]:
        return frozenset(self.spared)


def climb(problem: Problem) -> list[Rung]:
    """Return the rungs, from nothing spared to all groups with a cost."""
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
    """Choose `count` rungs, including both ends, with costs spaced as evenly as possible."""
    chosen = {0, len(rungs) - 1}
    for turn in range(1, count - 1):
        aim = rungs[0].cost + (rungs[-1].cost - rungs[0].cost) * turn / (count - 1)
        free = [index for index in range(len(rungs)) if index not in chosen]
        if free:
            chosen.add(min(free, key=lambda index: abs(rungs[index].cost - aim)))
    return sorted(chosen)


def _worth(problem: Problem, spared: frozenset[Key], offer: tuple[Key, ...]) -> float:
    """Return the error that sparing the offered groups saves, per cost."""
    after = spared | set(offer)
    touched = set(offer).union(*(problem.made_by.get(key, ()) for key in offer))
    saved = sum(problem.effect(key, spared) - problem.effect(key, after) for key in touched)
    return saved / sum(problem.groups[key].cost(problem.cost) for key in offer)


def _rung(problem: Problem, spared: tuple[Key, ...]) -> Rung:
    here = frozenset(spared)
    return Rung(spared, problem.spent(here), problem.predict(here))
