"""The denoiser's loop: joins, cancellations, failures, memory; a small engine, no server."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from kit.engine import Array
from kit.errors import CancelledError, EngineError
from kit.ports import ports
from pipeline.denoise import Denoiser
from pipeline.scheduling import Scheduler
from serve.step_loop import Answer, StepJob, StepLoop
from tests.pipeline.test_denoise import small, start

VARIANT = small("klein-4b")
SECONDS = 20.0


class SmallMemory:
    """An engine that adds a tenth, with room for so many rows, that can be told to fail or to wait."""

    def __init__(self, most: int = 99) -> None:
        self.ports = ports("transformer", VARIANT, "fp32")
        self.most = most
        self.calls: list[int] = []
        self.bug: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        hidden: Any = inputs["hidden_states"]
        assert self.gate.wait(SECONDS)
        self.calls.append(len(hidden))
        if self.bug is not None:
            raise self.bug
        if len(hidden) > self.most:
            raise EngineError("out of memory")
        return {"velocity": 0.1 * hidden}


class Collected:
    """Waits for the answer of a job."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        self.came = threading.Event()

    def __call__(self, answer: Answer) -> None:
        self.answers.append(answer)
        self.came.set()

    def result(self) -> Answer:
        assert self.came.wait(SECONDS)
        (answer,) = self.answers
        return answer


def loop_of(engine: SmallMemory) -> StepLoop:
    return StepLoop(Denoiser(VARIANT, "fp32", engine), Scheduler(16))


def submit(loop: StepLoop, wanted: Any = lambda: True, **fields: Any) -> Collected:
    collected = Collected()
    loop.submit(StepJob(start(loop.denoiser, **fields), collected, wanted))
    return collected


def test_jobs_are_answered_with_their_own_latents() -> None:
    loop = loop_of(SmallMemory())
    wishes: list[dict[str, Any]] = [{"seed": n, "steps": 2 + n} for n in range(5)]
    together = [submit(loop, **wish) for wish in wishes]
    for wish, collected in zip(wishes, together, strict=True):
        alone = start(loop.denoiser, **wish)
        while not alone.done:
            loop.denoiser.step([alone])
        assert np.array_equal(collected.result(), alone.image_latents())  # type: ignore[arg-type]
    loop.close()


def test_a_call_without_memory_is_halved_until_it_fits() -> None:
    engine = SmallMemory(most=1)
    loop = loop_of(engine)
    engine.gate.clear()  # so that the jobs meet
    jobs = [submit(loop, seed=n, steps=3) for n in range(6)]
    engine.gate.set()
    assert all(isinstance(job.result(), np.ndarray) for job in jobs)
    assert max(engine.calls) > 1
    loop.close()


def test_a_request_that_does_not_fit_alone_fails_alone() -> None:
    loop = loop_of(SmallMemory(most=1))
    wide, narrow = submit(loop, num_images=2), submit(loop)
    assert isinstance(wide.result(), EngineError)
    assert isinstance(narrow.result(), np.ndarray)
    loop.close()


def test_a_cancelled_job_ends_before_its_next_step() -> None:
    engine = SmallMemory()
    engine.gate.clear()
    loop = loop_of(engine)
    left = threading.Event()
    job = submit(loop, wanted=lambda: not left.is_set(), steps=50)
    left.set()
    engine.gate.set()
    assert isinstance(job.result(), CancelledError)
    assert len(engine.calls) <= 1
    loop.close()


def test_a_bug_in_a_step_fails_the_jobs_and_not_the_loop(caplog: pytest.LogCaptureFixture) -> None:
    engine = SmallMemory()
    loop = loop_of(engine)
    engine.bug = ValueError("shapes")
    answer = submit(loop).result()
    assert isinstance(answer, EngineError)
    assert "the denoising loop failed: shapes" in str(answer)
    engine.bug = None
    assert isinstance(submit(loop).result(), np.ndarray)
    loop.close()
    assert "Traceback" in caplog.text


def test_closing_answers_what_is_left() -> None:
    engine = SmallMemory()
    engine.gate.clear()
    loop = loop_of(engine)
    jobs = [submit(loop, seed=n, steps=9) for n in range(3)]
    closing = threading.Thread(target=loop.close)
    closing.start()
    engine.gate.set()
    closing.join(SECONDS)
    assert all(isinstance(job.result(), CancelledError) for job in jobs)
