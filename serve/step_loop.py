"""The denoiser's thread: choose requests, advance them by one step in one engine call, answer those that are done."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kit.engine import Array
from kit.errors import CancelledError, EngineError
from pipeline.denoise import Denoiser
from pipeline.live_request import LiveRequest
from pipeline.scheduling import Scheduler, Shape

logger = logging.getLogger(__name__)
Answer = Array | Exception  # latents [N, 128, h, w], or what went wrong


@dataclass(eq=False)
class StepJob:
    """A request that is denoised, and whom to tell."""

    live: LiveRequest
    answer: Callable[[Answer], None]  # called once, from the loop's thread
    wanted: Callable[[], bool] = lambda: True  # whether someone still waits for it
    advanced: Callable[[LiveRequest], None] = lambda _: None  # called after each of its steps
    batch: bool = False  # the lower of the two priorities

    @property
    def shape(self) -> Shape:
        return self.live.shape

    @property
    def rows(self) -> int:
        return self.live.batch_rows

    @property
    def steps_left(self) -> int:
        return len(self.live.times) - self.live.index


class StepLoop:
    """Denoises jobs until it is closed.

    `observe` is told (live jobs, jobs, rows, seconds) of each engine call, `extracted` the seconds in which klein-kv's
    references were read.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Scheduler,
        observe: Callable[[int, int, int, float], None] = lambda *_: None,
        extracted: Callable[[float], None] = lambda _: None,
    ) -> None:
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.observe = observe
        self.extracted = extracted
        self._jobs: list[StepJob] = []
        self._arrived: list[StepJob] = []
        self._wake = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="denoise", daemon=True)
        self._thread.start()

    def submit(self, job: StepJob) -> None:
        """Hand over a job; it joins before the next step."""
        with self._wake:
            self._arrived.append(job)
            self._wake.notify()

    def close(self) -> None:
        """Stop after the step that is running; the remaining jobs are answered with a CancelledError."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._closed and not self._jobs and not self._arrived:
                    self._wake.wait()
                self._jobs += self._arrived
                self._arrived = []
                closed = self._closed
            if closed:
                for job in self._jobs:
                    self._end(job, CancelledError("the server is stopping"))
                return
            try:
                self.turn(self._jobs)
            except Exception as error:  # a bug must not leave clients waiting for a thread that has ended
                logger.exception("the denoising loop failed")
                for job in self._jobs:
                    self._end(job, EngineError(f"the denoising loop failed: {error}"))
                self._jobs = []

    def turn(self, jobs: list[StepJob]) -> None:
        """Drop unwanted jobs, advance some of the others by one step, and answer what is finished."""
        for job in [job for job in jobs if not job.wanted()]:
            jobs.remove(job)
            self._end(job, CancelledError("the client has cancelled the request"))
        unread = next((job for job in jobs if job.live.unread is not None), None)
        if unread is not None:  # one before each step, so that requests that are on their way go on
            self._read(unread, jobs)
        ready = [job for job in jobs if job.live.unread is None]
        if not ready:
            return
        chosen = self.scheduler.choose(ready)
        running = [ready[i] for i in chosen]
        start = time.perf_counter()
        self.denoiser.call(tuple(job.live for job in running))
        seconds = time.perf_counter() - start
        self.scheduler.ran(ready, chosen, seconds)
        self.observe(len(jobs), len(running), sum(job.rows for job in running), seconds)
        for job in running:
            if job.live.error is not None:
                jobs.remove(job)
                self._end(job, EngineError(job.live.error))
            elif job.live.done:
                jobs.remove(job)
                self._end(job, job.live.image_latents())
            else:
                job.advanced(job.live)

    def _read(self, job: StepJob, jobs: list[StepJob]) -> None:
        """Read the references of a job of klein-kv, or find what was read before."""
        start = time.perf_counter()
        if self.denoiser.read(job.live):
            self.extracted(time.perf_counter() - start)
        if job.live.error is not None:
            jobs.remove(job)
            self._end(job, EngineError(job.live.error))

    def _end(self, job: StepJob, answer: Answer) -> None:
        self.scheduler.forget(job)
        try:
            job.answer(answer)
        except Exception:
            logger.exception("a response could not be sent")
