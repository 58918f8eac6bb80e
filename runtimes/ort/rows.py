"""The rows of a call side by side, each on a core of its own: for small graphs on a CPU.

ONNX Runtime cuts every operator between the cores. Small operators end sooner than the other cores wake up: of the
sample's transformer, 16 rows took 9.3 ms a row on two threads, and 6.6 ms as two halves of one thread each; the text
encoder 8.9 ms on two threads and 6.7 ms on one (medians, Xeon with avx512_vnni, two shared cores, 2026-11-27). Each
row's results are the same bits: neither a thread nor another row changes the order of a sum.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from kit.engine import Array

TRIALS = 3  # timed calls of a single row on one thread, and on all, before one of the two is preferred
AGAIN = 50  # the other is tried again after so many calls: the machine may be busier now
PAST = 0.8  # weight of the past
SHAPES = 64  # whose times are kept


class SideBySide:
    """Runs one graph that is open twice: `whole` with a thread on every core, `single` with one thread.

    A call of several rows is divided between the cores. A call of one row runs in the session that has been faster for
    its shapes.
    """

    def __init__(self, whole: Any, single: Any, cores: int) -> None:
        self._sessions = (whole, single)
        self._cores = cores
        self._pool = ThreadPoolExecutor(cores - 1, "rows")
        self._times: dict[tuple[tuple[int, ...], ...], tuple[list[float], list[int]]] = {}

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        """Return the outputs of all rows; every array has the rows as its first axis."""
        rows = min(len(array) for array in inputs.values())
        parts = min(rows, self._cores)
        if parts < 2 or any(len(array) != rows for array in inputs.values()):
            return self._run_one(outputs, dict(inputs))
        single = self._sessions[1]
        cut = {name: np.array_split(array, parts) for name, array in inputs.items()}
        shares = [{name: arrays[i] for name, arrays in cut.items()} for i in range(parts)]
        others = [self._pool.submit(single.run, outputs, share) for share in shares[1:]]
        try:
            first = single.run(outputs, shares[0])
        finally:
            failures = [other.exception() for other in others]  # waits: they read the caller's arrays
        if failure := next((failure for failure in failures if failure is not None), None):
            raise failure
        results = [first, *(other.result() for other in others)]
        return [np.concatenate(arrays) for arrays in zip(*results, strict=True)]

    def _run_one(self, outputs: Sequence[str], inputs: dict[str, Array]) -> list[Array]:
        key = tuple(array.shape for array in inputs.values())
        if key not in self._times and len(self._times) == SHAPES:
            self._times.clear()
        seconds, counts = self._times.setdefault(key, ([0.0, 0.0], [0, 0]))
        which = _choice(seconds, counts)
        start = time.perf_counter()
        results: list[Array] = self._sessions[which].run(outputs, inputs)
        spent = time.perf_counter() - start
        weight = PAST if counts[which] >= TRIALS else min(counts[which], 1) / 2  # the first calls allocate memory
        seconds[which] = weight * seconds[which] + (1 - weight) * spent
        counts[which] += 1
        return results


def _choice(seconds: Sequence[float], counts: Sequence[int]) -> int:
    """Return which of two sessions runs a single row, from their mean times and numbers of calls."""
    fewer = min((0, 1), key=counts.__getitem__)
    if counts[fewer] < TRIALS or sum(counts) % AGAIN == 0:
        return fewer
    return min((0, 1), key=seconds.__getitem__)
