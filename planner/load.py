"""Choose the number of replicas for a rate and a waiting-time goal, and simulate how long their requests take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from planner.queueing import Waiting, best_gain, simulate
from planner.timing import Range

BUSY_AT_MOST = 0.85  # of a replica at the slow end of the range, when the planner chooses the number of replicas
MOST_TIMES = 64  # a waiting-time goal gets at most this many times the replicas that the rate alone needs
TIMES = ("mean", "p50", "p95", "p99")  # of Waiting


@dataclass(frozen=True)
class Load:
    """The load on the replicas at the requested rate."""

    replicas: int
    waiting: Waiting | None  # at the best estimate; None: overloaded
    slow: Waiting | None  # at the slow end of the range
    goal: float | None = None  # seconds that the 95th percentile must not exceed at the slow end

    @property
    def meets(self) -> bool:
        """Return whether the goal is met; True without one."""
        return self.goal is None or (self.slow is not None and self.slow.p95 <= self.goal)


@dataclass(frozen=True)
class Service:
    """What one replica does with requests: the time of one image alone on it, and what sharing gains."""

    alone: Range  # seconds on the GPU
    gains: Sequence[float]  # throughput with n requests in the batch, relative to one
    outside: Range  # seconds of an image outside the GPU
    step: float  # share of `alone` that one step takes, which nothing interrupts

    def needed(self, per_second: float) -> int:
        """Return the fewest replicas that are busy for at most BUSY_AT_MOST of the time at the slow end."""
        return max(1, math.ceil(per_second * self.alone.high / best_gain(self.gains) / BUSY_AT_MOST))

    def wait(self, per_second: float, replicas: int, end: Literal["mid", "high"]) -> Waiting | None:
        """Simulate requests at the best estimate or the slow end; None if the replicas cannot keep up."""
        alone = getattr(self.alone, end)
        found = simulate(per_second, self.gains, alone, replicas, alone * self.step)
        if found is None:
            return None
        outside = getattr(self.outside, end)
        moved = {name: getattr(found, name) + outside for name in TIMES}
        return replace(found, **moved)


def find_load(service: Service, per_second: float, replicas: int | None, goal: float | None) -> Load:
    """Simulate the given number of replicas, or as many as the rate and the goal need.

    Without a number that meets the goal, the result has the number that the rate needs.
    """
    fewest = replicas or service.needed(per_second)
    count = fewest
    if replicas is None and goal is not None:
        count = _fewest_for_goal(service, per_second, fewest, goal) or fewest
    waiting, slow = service.wait(per_second, count, "mid"), service.wait(per_second, count, "high")
    return Load(count, waiting, _no_better(slow, waiting), goal)


def _no_better(slow: Waiting | None, waiting: Waiting | None) -> Waiting | None:
    """Return the slow end with no time below the best estimate.

    Where both ends are close, requests of several replicas change places between the two simulations, which moves a
    percentile by a few tenths of a percent either way.
    """
    if slow is None or waiting is None:
        return slow
    return replace(slow, **{name: max(getattr(slow, name), getattr(waiting, name)) for name in TIMES})


def _fewest_for_goal(service: Service, per_second: float, fewest: int, goal: float) -> int | None:
    """Search the smallest number of replicas that meets the goal; None if there is none in reach."""
    if service.alone.high + service.outside.high > goal:
        return None

    def meets(count: int) -> bool:
        slow = service.wait(per_second, count, "high")
        return slow is not None and slow.p95 <= goal

    high = fewest
    while not meets(high):
        high *= 2
        if high > fewest * MOST_TIMES:
            return None
    low = high // 2 if high > fewest else fewest - 1  # the largest known to miss it
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high
