"""What a terminal shows of builds: one progress bar for all plans, a line per plan when it is done, warnings."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tqdm import tqdm

from runtimes.trt.build.account import sentence
from runtimes.trt.build.jobs import Job
from runtimes.trt.record import PlanRecord


class Report:
    """The progress of several builds; without a terminal, a plain line when one starts and when one is done."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._files = [job.plan.file for job in jobs]
        self._fractions: dict[int, float] = {}
        self._silent = not sys.stderr.isatty()
        self._bar = tqdm(total=100, unit="%", disable=self._silent, leave=False)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def tick(self, place: int, fraction: float, phase: str) -> None:
        """Show how far a build is."""
        if self._silent and place not in self._fractions:
            print(f"building {self._files[place]}", file=sys.stderr, flush=True)
        self._fractions[place] = fraction
        self._bar.set_postfix_str(f"{self._files[place]}: {phase[:40]}", refresh=False)
        self._bar.update(max(0, int(100 * sum(self._fractions.values()) / len(self._files)) - self._bar.n))

    def done(self, made: PlanRecord) -> None:
        """Print what became of a plan."""
        self._bar.clear()
        print(f"{made.file:<32} {made.bytes / 1e6:9.1f} MB  {sentence(made.layers)}", flush=True)
        if missed := made.layers["missed"]:
            names = ", ".join(missed[:3])
            _warn(f"quantized products that run in a wider type: {names}, ...")
        if unfused := made.layers["attention"]["unfused"]:
            names = ", ".join(unfused[:3])
            _warn(f"attention that is not one kernel, so its scores go through memory: {names}")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
