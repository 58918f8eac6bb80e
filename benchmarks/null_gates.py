"""Count false alarms: gates on random parts of the prompts of null runs, which every contract should pass.

With few prompts the interval of a counted metric is wider than a small bound, so the general contracts break although
nothing is wrong. `by_prompts` measures from how many prompts on they do not; the bounds' `least_prompts` come from it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from quantize.gate import contract as contracts
from quantize.gate.contract import Contract
from quantize.gate.drawing import Pair
from quantize.gate.report import Report, summarize

GATES = 100  # on random parts of the null runs
SUBSET = 48  # prompts of one of them
MOST_ALARMS = 0.05
PROMPTS = (48, 96, 150, 200)  # of the gates on general contracts


def judge(pairs: Sequence[Pair], contract: Contract) -> Report:
    """Judge pairs by a contract."""
    return summarize(pairs, {}, contract, {}, ())


def broken_gates(runs: Sequence[Sequence[Pair]], contract: Contract, prompts: int = SUBSET) -> list[set[str]]:
    """Return the metrics whose bounds break, per gate on random parts of random runs; empty sets are kept gates."""
    draw, found = random.Random(0), []
    for _ in range(GATES):
        pairs = list(draw.choice(runs))
        report = judge(draw.sample(pairs, min(prompts, len(pairs))), contract)
        found.append({fault.split()[0] for fault in report.faults})
    return found


def by_prompts(pairs: Sequence[Pair], recipe: str) -> dict[str, Any]:
    """Return the share of gates that break a recipe's general contract, by the number of their prompts."""
    contract = contracts.of_recipe(recipe)
    bare = replace(
        contract, least_prompts=1, bounds=tuple(replace(bound, least_prompts=1) for bound in contract.bounds)
    )
    broken = {count: broken_gates([pairs], bare, count) for count in PROMPTS}
    change = judge(pairs, bare).rows["judge_change"].found
    return {
        "prompts": len(pairs),
        "false_alarms": {count: sum(map(bool, gates)) / GATES for count, gates in broken.items()},
        "broken": sorted(set().union(*(gate for gates in broken.values() for gate in gates))),
        "judge_change": {"mean": change.mean, "low": change.low, "high": change.high},
    }


def least_prompts(alarms: dict[int, float]) -> int | None:
    """Return the fewest prompts from which on no more than MOST_ALARMS of the gates break; None if there are none."""
    enough = [count for count in alarms if all(share <= MOST_ALARMS for n, share in alarms.items() if n >= count)]
    return min(enough, default=None)
