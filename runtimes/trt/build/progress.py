"""TensorRT's nested build phases as one fraction, and a way to stop a build: return False from a finished step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import tensorrt as trt

from runtimes.trt.build.apart import Tick


@dataclass
class Phase:
    """A phase of the build and its parent phase."""

    parent: str
    steps: int
    done: int = 0


@dataclass
class Phases:
    """The open phases."""

    open: dict[str, Phase] = field(default_factory=dict)

    def fraction(self, name: str | None = None) -> float:
        """Return the fraction done of a phase, or of the build if `name` is None; open children count in their step."""
        roots = [n for n, phase in self.open.items() if phase.parent not in self.open] if name is None else []
        if name is None:
            return sum(self.fraction(root) for root in roots) / len(roots) if roots else 0.0
        phase = self.open[name]
        children = [n for n, child in self.open.items() if child.parent == name]
        inner = sum(self.fraction(child) for child in children) / len(children) if children else 0.0
        return min(1.0, (phase.done + inner) / max(1, phase.steps))


class Progress(trt.IProgressMonitor):
    """Reports progress to `tick`; TensorRT calls it from its own threads."""

    def __init__(self, tick: Tick) -> None:
        trt.IProgressMonitor.__init__(self)
        self._tick = tick
        self._lock = threading.Lock()
        self._phases = Phases()
        self._highest = 0.0
        self.stop = threading.Event()  # once set, TensorRT stops the build at its next step

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            self._phases.open[phase_name] = Phase(parent_phase or "", num_steps)
            self._report(phase_name)

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._lock:
            if phase_name in self._phases.open:
                self._phases.open[phase_name].done = step + 1
                self._report(phase_name)
        return not self.stop.is_set()

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            self._phases.open.pop(phase_name, None)

    def _report(self, phase: str) -> None:
        self._highest = max(self._highest, self._phases.fraction())  # a progress bar must not move backwards
        self._tick(self._highest, phase)


def interruptible(work: Callable[[], bool], progress: Progress) -> bool:
    """Run a build on a separate thread, so that Ctrl-C reaches Python while TensorRT is in C++.

    On KeyboardInterrupt, ask the build to stop, wait for it, and re-raise.
    """
    built = False
    failure: BaseException | None = None

    def run() -> None:
        nonlocal built, failure
        try:
            built = work()
        except BaseException as error:
            failure = error

    thread = threading.Thread(target=run, name="tensorrt-build", daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.1)
    except KeyboardInterrupt:
        progress.stop.set()
        thread.join()
        raise
    if failure is not None:
        raise failure
    return built
