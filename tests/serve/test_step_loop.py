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
from pipeline.references import References
from pipeline.request import Limits, check
from pipeline.scheduling import Scheduler
from pipeline.store import Store
from serve.step_loop import Answer, StepJob, StepLoop
from tests.pipeline.test_denoise import small, start

VARIANT, KV = small("klein-4b"), small("klein-9b-kv")
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


class Extract:
    """klein-kv's graph that reads references: keys and values are their latents; it counts its calls."""

    def __init__(self) -> None:
        self.ports = ports("transformer_extract", KV, "fp32")
        self.calls = 0
        self.fails = False

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if self.fails:
            raise EngineError("out of memory")
        self.calls += 1
        latents: Any = inputs["ref_hidden_states"]
        return {"ref_key_0": latents[:, None, :, :4].copy(), "ref_value_0": latents[:, None, :, 4:8].copy()}


class Cached(SmallMemory):
    """Adds to the velocity what the references of a row say."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        values: Any = inputs["ref_value_0"]
        plain: Any = super().run(inputs)["velocity"]
        return {"velocity": plain + values.mean(axis=(1, 2, 3))[:, None, None]}


def kv_loop(extract: Extract, store: Store | None = None, engine: SmallMemory | None = None) -> StepLoop:
    denoiser = Denoiser(KV, "fp32", engine or SmallMemory(), extract=extract, cached=Cached(), store=store)
    return StepLoop(denoiser, Scheduler(16))


def submit_edit(loop: StepLoop, number: int, tokens: int = 16, key: str = "") -> Collected:
    """Submit a request of klein-kv whose references are a number."""
    references = References(np.full((tokens, 128), number, np.float32), np.zeros((tokens, 4), np.int64))
    text = np.full((KV.text_tokens, KV.transformer.joint_dim), 0.5, np.float32)
    fields = {"prompt": "a", "seed": 1, "width": 64, "height": 64, "steps": 3}
    request = check(fields, KV, Limits())
    collected = Collected()
    loop.submit(StepJob(loop.denoiser.admit(request, text, references=references, memory_key=key), collected))
    return collected


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
    apart = Denoiser(VARIANT, "fp32", SmallMemory())  # the loop's is used by its thread
    for wish, collected in zip(wishes, together, strict=True):
        alone = start(apart, **wish)
        while not alone.done:
            apart.step([alone])
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


def test_references_with_and_without_cache_and_plain_requests_live_side_by_side() -> None:
    """Each gets what it gets alone, though requests with other references and without any are in the loop."""
    extract = Extract()
    loop = kv_loop(extract)
    alone = [submit_edit(loop, number, tokens).result() for number, tokens in ((1, 16), (2, 16), (3, 8))]
    plain = submit(loop, steps=3).result()
    together = [submit_edit(loop, number, tokens) for number, tokens in ((1, 16), (2, 16), (3, 8))]
    beside = submit(loop, steps=3)
    for collected, expected in zip((*together, beside), (*alone, plain), strict=True):
        assert np.array_equal(collected.result(), expected)  # type: ignore[arg-type]
    assert not np.array_equal(alone[0], alone[1])  # type: ignore[arg-type]
    assert extract.calls == 6
    loop.close()


def test_the_same_references_are_read_once_and_others_of_their_size_are_not_mixed_up() -> None:
    extract, store = Extract(), Store(2**20)
    loop, other = kv_loop(extract, store), kv_loop(Extract())
    wanted = [submit_edit(other, number).result() for number in (1, 2)]
    other.close()
    for _ in range(3):
        jobs = [submit_edit(loop, number, key=f"keys_values:{number}") for number in (1, 2, 1)]
        for job, number in zip(jobs, (1, 2, 1), strict=True):
            assert np.array_equal(job.result(), wanted[number - 1])  # type: ignore[arg-type]
    assert extract.calls == 2
    loop.close()


def test_references_that_cannot_be_read_fail_their_own_request() -> None:
    extract = Extract()
    extract.fails = True
    loop = kv_loop(extract)
    failed, plain = submit_edit(loop, 1), submit(loop)
    assert isinstance(failed.result(), EngineError)
    assert isinstance(plain.result(), np.ndarray)
    loop.close()


def test_a_request_that_is_cancelled_before_its_references_are_read_never_reads_them() -> None:
    extract, engine = Extract(), SmallMemory()
    loop = kv_loop(extract, engine=engine)
    engine.gate.clear()
    plain = submit(loop, steps=1)
    references = References(np.zeros((16, 128), np.float32), np.zeros((16, 4), np.int64))
    text = np.full((KV.text_tokens, KV.transformer.joint_dim), 0.5, np.float32)
    request = check({"prompt": "a", "seed": 1, "width": 64, "height": 64}, KV, Limits())
    edit = Collected()
    loop.submit(StepJob(loop.denoiser.admit(request, text, references=references), edit, wanted=lambda: False))
    engine.gate.set()
    assert isinstance(plain.result(), np.ndarray)
    assert isinstance(edit.result(), CancelledError)
    assert extract.calls == 0
    loop.close()
