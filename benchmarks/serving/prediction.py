"""The planner's queue beside measured loads: its p95 for the very same arrivals, from what is known without load.

It knows the seconds of lone requests, the gains of sharing and the seconds of a step; nothing is fitted to the loads.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.serving.loads import percentile
from planner.queueing import replay


def predict(facts: Mapping[str, Any], samples: list[list[Any]]) -> dict[str, Any]:
    """Serve the arrivals of a load by the planner's queue; `error` is predicted / measured - 1, of the p95."""
    names = list(facts["mix"])
    alone = [median(facts["alone_seconds"][name]) for name in names]
    capacity = facts["capacity"]
    arrivals = [(at, alone[kind]) for at, kind, _ in samples]
    told = replay(arrivals, capacity["gains_by_requests_in_flight"], step=capacity["step_seconds"])

    def both(kinds: set[int]) -> dict[str, Any]:
        found = [(t, seen) for t, (_, kind, seen) in zip(told, samples, strict=True) if kind in kinds]
        p95 = percentile([t for t, _ in found], 95)
        seen = percentile([seen for _, seen in found if seen is not None], 95)
        return {"predicted_p95": p95, "p95": seen, "error": round(p95 / seen - 1, 3) if p95 and seen else None}

    return {"all": both(set(range(len(names)))), "classes": {name: both({i}) for i, name in enumerate(names)}}
