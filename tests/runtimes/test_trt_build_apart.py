"""Builds in child processes: a crash, a kill, Ctrl-C and the death of the parent, all of them real."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.compilers import COMPILERS
from kit.errors import CheckFailed
from kit.ports import Ports
from runtimes.trt.build import apart
from runtimes.trt.build.apart import Work
from runtimes.trt.build.jobs import Job, died, workers
from runtimes.trt.build.options import EngineOptions, PlannedPlan
from tests.runtimes.test_trt_build_command import L4

RTX = COMPILERS["tensorrt-rtx"]
PLAN = PlannedPlan("transformer", "transformer/model.plan", ())


def double(number: int, tick: apart.Tick) -> int:
    tick(0.5, "half")
    tick(1.0, "done")
    return 2 * number


def fall_over(name: str, tick: apart.Tick) -> None:
    signal.raise_signal(signal.Signals[name])


def fill_the_disk(tick: apart.Tick) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "model.plan")


def refuse(tick: apart.Tick) -> None:
    raise CheckFailed("the parser rejects node 3", {"node": 3})


def leave(tick: apart.Tick) -> None:
    os._exit(3)


def unpicklable(tick: apart.Tick) -> Any:
    return lambda: None


def wait_for_ever(mark: str, tick: apart.Tick) -> None:
    """Say who runs, then wait; write how it ended."""
    try:
        Path(mark).write_text(str(os.getpid()))
        tick(0.1, "waiting")
        while True:
            time.sleep(0.05)
    except KeyboardInterrupt:
        Path(mark).write_text("stopped")
        raise


def run(*works: tuple[Callable[..., Any], tuple[Any, ...]], at_a_time: int = 1) -> dict[int, Any]:
    found: dict[int, Any] = {}
    apart.run([Work(w.__name__, w, a) for w, a in works], at_a_time, lambda *_: None, found.__setitem__)
    return found


def test_results_and_progress_arrive_from_each_child() -> None:
    ticks: list[tuple[int, float, str]] = []
    found: dict[int, Any] = {}
    works = [Work(str(i), double, (i,)) for i in range(3)]
    apart.run(works, 2, lambda place, fraction, phase: ticks.append((place, fraction, phase)), found.__setitem__)
    assert found == {0: 0, 1: 2, 2: 4}
    assert sorted(ticks) == [(i, f, p) for i in range(3) for f, p in ((0.5, "half"), (1.0, "done"))]


@pytest.mark.parametrize("name", ["SIGFPE", "SIGSEGV", "SIGABRT", "SIGKILL"])
def test_a_child_that_dies_is_told_by_its_signal(name: str) -> None:
    with pytest.raises(apart.Died, match=f"fall_over: its process ended with {name}") as caught:
        run((fall_over, (name,)))
    assert caught.value.signal == signal.Signals[name]


def test_a_child_that_leaves_without_an_answer_is_told_by_its_exit_code() -> None:
    for work in (leave, unpicklable):
        with pytest.raises(apart.Died, match=f"{work.__name__}: its process ended with exit code"):
            run((work, ()))


def test_what_a_child_raises_is_raised_here() -> None:
    with pytest.raises(CheckFailed, match="the parser rejects node 3") as caught:
        run((refuse, ()))
    assert caught.value.facts == {"node": 3}
    assert "in refuse" in caught.value.__notes__[0]
    with pytest.raises(OSError, match="No space left on device") as full:
        run((fill_the_disk, ()))
    assert full.value.errno == errno.ENOSPC


def test_when_one_child_dies_the_others_are_ended(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with pytest.raises(apart.Died, match="fall_over"):
        run((wait_for_ever, (str(mark),)), (fall_over, ("SIGFPE",)), at_a_time=2)
    assert not mark.exists() or not is_running(int(mark.read_text()))


def is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


PARENT = """
import sys
from runtimes.trt.build import apart
from tests.runtimes.test_trt_build_apart import wait_for_ever
apart.run([apart.Work("waiting", wait_for_ever, (sys.argv[1],))], 1, lambda *_: None, lambda *_: None)
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL", "SIGTERM"])
def test_a_child_ends_with_its_parent_and_is_asked_to_stop_by_an_interrupt(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(mark)], env=environment, stderr=subprocess.PIPE)
    child = int(until(lambda: mark.read_text() if mark.exists() else ""))
    parent.send_signal(signal.Signals[name])
    parent.communicate(timeout=30)
    until(lambda: "" if is_running(child) else "ended")
    assert mark.read_text() == ("stopped" if name == "SIGINT" else str(child))


def until(find: Callable[[], str], seconds: float = 30) -> str:
    begin = time.monotonic()
    while not (found := find()):
        assert time.monotonic() - begin < seconds
        time.sleep(0.05)
    return found


@pytest.mark.parametrize(
    ("end", "weights", "words"),
    [
        (
            -signal.SIGFPE,
            "plan",
            "transformer/model.plan: TensorRT for RTX 1.7.1.116 crashed (SIGFPE) while it built the transformer. This "
            "is an error of the compiler for this graph: try other --sides or --profile, another recipe or "
            "--attention, or another version of TensorRT for RTX",
        ),
        (-signal.SIGKILL, "plan", "build fewer at a time with --parts, or use --weights inputs, which reads no"),
        (-signal.SIGKILL, "inputs", "free memory, build fewer at a time with --parts"),
        (3, "plan", "left the build of the transformer without a reason (its messages are above)"),
    ],
)
def test_the_death_of_a_compiler_is_one_sentence_with_a_remedy(end: int, weights: Any, words: str) -> None:
    error = apart.Died(Work("x", double, ()), end)
    assert words in died(PLAN, EngineOptions("l4", weights=weights), RTX, "1.7.1.116", error)


def test_only_plans_without_weights_are_built_side_by_side() -> None:
    def job(weights: Any, compiler: str) -> Job:
        options = EngineOptions("l4", weights=weights)
        return Job(PLAN, Path("g"), Ports((), ()), options, Path("o"), compiler, L4, Path("t"))

    assert workers([job("inputs", "tensorrt-rtx")]) == len(os.sched_getaffinity(0))
    assert workers([job("plan", "tensorrt-rtx")]) == workers([job("inputs", "tensorrt")]) == 1
