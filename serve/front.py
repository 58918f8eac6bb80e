"""The front model: admit requests, pass them to the ensemble, and notice when their client leaves.

Triton tells a model that its own request was cancelled, but not the models of an ensemble. So clients call this model,
which holds a ticket for each of its requests and marks it in the ledger when the client has left or the deadline has
passed; the denoiser then ends that request before its next step.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from kit.errors import (
    CancelledError,
    EngineError,
    Flux2Error,
    RequestError,
    UnavailableError,
)
from pipeline.request import Request, check
from serve.admission import Admission, Entry, cost_of
from serve.incoming import Options, bytes_of, digest
from serve.ledger import Ledger, State
from serve.settings import Settings

logger = logging.getLogger(__name__)
LIVE_SWEEP = 0.05  # seconds between two looks at the clients of requests that are worked on
DENOISED_POLL = 0.002  # seconds between two looks at which requests the denoiser has done
HEAL_SECONDS = 600.0  # that a stage waits for a process to be restarted
WAITING_SWEEP = 0.5  # and of those that wait
FAULT = re.compile(
    r"[Ss]tub process|not healthy|unknown model|no version|not at ready state|is not ready|unexpectedly|shutting down"
)


class Caller(Protocol):
    """One request of a client, as Triton passes it."""

    def is_cancelled(self) -> bool: ...
    def stage(self, name: str, since: float = 0.0) -> AbstractContextManager[None]:
        """Trace a stage of the request that began `since` seconds ago."""
        ...

    def start(self, request: Request, ticket: int, cache: bool) -> None:
        """Encode prompts and images and hand the request to the denoiser; raises Flux2Error.

        Without `cache`, nothing is taken from what other requests left.
        """
        ...

    def fetch(self, ticket: int) -> Any:
        """Return the latents from the denoiser; raises Flux2Error."""
        ...

    def finish(self, request: Request, latents: Any) -> Any:
        """Decode latents and return the encoded images; raises Flux2Error."""
        ...

    def succeed(self, outputs: Any) -> None: ...
    def fail(self, error: Exception) -> None: ...


class Counts(Protocol):
    """Where the front counts: serve.metrics.Metrics, or a stand-in."""

    def add(self, name: str, amount: float = 1, label: str = "") -> None: ...
    def set(self, name: str, value: float) -> None: ...
    def observe(self, name: str, value: float) -> None: ...


@dataclass(eq=False)
class _Call:
    """The payload of an Entry."""

    caller: Caller
    request: Request
    ticket: int
    cache: bool
    denoisers: int = 0  # the ledger's number when it was started
    denoised: threading.Event = field(default_factory=threading.Event)  # or lost, or answered
    answered: bool = False
    left: bool = False  # cancelled by its client
    lock: threading.Lock = field(default_factory=threading.Lock)  # Triton frees a request when it is answered

    def has_left(self) -> bool:
        """Return whether the client has left an unanswered request."""
        with self.lock:
            return not self.answered and self.caller.is_cancelled()

    def answer(self, outputs: Any = None, error: Exception | None = None) -> bool:
        """Answer once; returns whether this was the answer."""
        with self.lock:
            if self.answered:
                return False
            self.answered = True
            self.denoised.set()
            if error is not None:
                self.caller.fail(error)
            else:
                self.caller.succeed(outputs)
            return True


class Front:
    """Admits requests and works on them in threads until it is closed."""

    def __init__(self, settings: Settings, ledger: Ledger, counts: Counts) -> None:
        self.settings = settings
        self.ledger = ledger
        self.counts = counts
        ledger.clear()
        tuning = settings.tuning
        self.admission = Admission(tuning.live_requests, tuning.queue_size, bytes_limit=tuning.queue_bytes)
        passes = 2 if settings.variant.guidance == "cfg" else 1
        width = settings.variant.transformer.joint_dim * (4 if settings.compute == "fp32" else 2)
        self._embed_bytes = passes * settings.variant.text_tokens * width
        self._pool = ThreadPoolExecutor(tuning.live_requests, "request")
        self._wake = threading.Condition()
        self._closed = self._ended = False
        self._heals = ledger.heals
        self._denoising: list[_Call] = []
        self._denoising_lock = threading.Lock()
        self._started = threading.Event()
        self._dispatcher = threading.Thread(target=self._run, daemon=True)
        self._watcher = threading.Thread(target=self._watch_denoiser, daemon=True)
        self._dispatcher.start()
        self._watcher.start()

    def receive(self, caller: Caller, fields: Mapping[str, Any], options: Options) -> None:
        """Admit a request or answer it with what is wrong; never waits."""
        self.counts.add("flux2_requests_total")
        try:
            request = check(fields, self.settings.variant, self.settings.limits)
            self._admit(caller, fields, request, options)
        except Flux2Error as error:
            reason = "unavailable" if isinstance(error, UnavailableError) else "invalid"
            self.counts.add("flux2_rejections_total", label=reason)
            caller.fail(error)

    def _admit(self, caller: Caller, fields: Mapping[str, Any], request: Request, options: Options) -> None:
        if self.ledger.state is State.DRAINING:
            raise UnavailableError("the server is stopping; send the request to another one, or again later")
        identity = digest(fields)
        if self.ledger.is_refused(identity):
            raise RequestError("this request has ended a process of the server twice and is not served again")
        most = self.settings.tuning.max_seconds
        seconds = most if options.timeout is None else min(options.timeout, most)
        entry = Entry(cost_of(request, self.settings.variant), options.batch, time.monotonic() + seconds)
        entry.bytes = bytes_of(fields)
        with self._wake:
            self.admission.offer(entry)
            ticket = self.ledger.open(identity, options.batch, options.tag)
            entry.payload = _Call(caller, request, ticket, options.cache)
            self._wake.notify()

    def close(self) -> None:
        """Answer what waits and end the threads."""
        with self._wake:
            self._closed = True
            waiting = list(self.admission.waiting)
            self._wake.notify()
        for entry in waiting:
            self._abandon(entry, UnavailableError("the server is stopping; send the request again later"))
        self._dispatcher.join()
        self._pool.shutdown(wait=True)  # what is worked on ends as it would have; its threads need the watcher
        self._ended = True
        self._watcher.join()

    def _run(self) -> None:
        swept = {"live": 0.0, "waiting": 0.0}
        while not self._closed:
            with self._wake:
                if not self.admission.waiting or len(self.admission.live) >= self.admission.live_limit:
                    self._wake.wait(LIVE_SWEEP if self.admission.in_flight else 0.5)
                elif self.ledger.state is State.HEALING:
                    self._wake.wait(LIVE_SWEEP)
            try:
                self._dispatch()
                self._sweep(swept)
                self._gauge()
            except Exception:  # a bug must not end the thread that all requests depend on
                logger.exception("the dispatcher failed")
                time.sleep(LIVE_SWEEP)

    def _dispatch(self) -> None:
        while self.ledger.state is not State.HEALING:
            with self._wake:
                entry = self.admission.take()
            if entry is None:
                return
            call: _Call = entry.payload
            if call.has_left():
                self._cancel(entry)
                self._release(entry)
                continue
            self.counts.observe("flux2_queue_seconds", time.monotonic() - entry.arrived)
            self.ledger.dispatch(call.ticket)
            self._pool.submit(self._work, entry)

    def _sweep(self, swept: dict[str, float]) -> None:
        """End the requests whose client has left or whose time is over."""
        now = time.monotonic()
        for name, period in (("live", LIVE_SWEEP), ("waiting", WAITING_SWEEP)):
            if now - swept[name] < period:
                continue
            swept[name] = now
            with self._wake:
                entries = list(getattr(self.admission, name))
            for entry in entries:
                call: _Call = entry.payload
                if call.has_left() or not self.ledger.is_wanted(call.ticket):
                    self._cancel(entry)
        with self._wake:
            shed, expired = self.admission.shed(), self.admission.expired()
            why = self.admission.why_full()
        for entry in shed:
            self.counts.add("flux2_rejections_total", label="overload")
            self._abandon(entry, UnavailableError(why))
        for entry in expired:
            self.counts.add("flux2_rejections_total", label="deadline")
            self._abandon(entry, UnavailableError("the request's time is over; it was given up"))

    def _cancel(self, entry: Entry) -> None:
        entry.payload.left = True
        if self._abandon(entry, CancelledError("the client has cancelled the request")):
            self.counts.add("flux2_cancellations_total")

    def _abandon(self, entry: Entry, error: Exception) -> bool:
        """Answer a request with an error and end its work; returns whether it was not answered before."""
        call: _Call = entry.payload
        self.ledger.cancel(call.ticket)
        first = call.answer(error=error)
        with self._wake:
            is_live = entry in self.admission.live
        if not is_live:  # a live one is released by its thread
            self._release(entry)
        return first

    def _work(self, entry: Entry) -> None:
        call: _Call = entry.payload
        try:
            with call.caller.stage("queue", time.monotonic() - entry.arrived):
                call.denoisers = self.ledger.denoisers
            with call.caller.stage("prompt"):
                self._twice(lambda: call.caller.start(call.request, call.ticket, call.cache))
            with call.caller.stage("denoise"):
                self._wait_for_latents(call)
                latents = call.caller.fetch(call.ticket)
            with call.caller.stage("image"):
                outputs = self._twice(lambda: call.caller.finish(call.request, latents))
        except Exception as error:
            self._fail(call, error)
            self._release(entry)
            return
        self.ledger.count_served()  # first: who has the answer finds it counted
        call.answer(outputs)
        with self._wake:
            self.admission.complete(entry)
            self.ledger.close(call.ticket)
            self._wake.notify()
        self.counts.observe("flux2_request_seconds", time.monotonic() - entry.arrived)
        self.counts.add("flux2_images_total", call.request.num_images)

    def _twice(self, stage: Callable[[], Any]) -> Any:
        """Run a stage of a request, and once more if one of its processes ended meanwhile."""
        try:
            return stage()
        except (EngineError, UnavailableError) as error:
            if not FAULT.search(str(error)):
                raise
            logger.warning("trying again: %s", error)
        deadline = time.monotonic() + HEAL_SECONDS
        time.sleep(3 * LIVE_SWEEP)  # until the supervisor has noticed
        while self.ledger.state is State.HEALING and time.monotonic() < deadline:
            time.sleep(LIVE_SWEEP)
        return stage()

    def _wait_for_latents(self, call: _Call) -> None:
        with self._denoising_lock:
            self._denoising.append(call)
            self._started.set()
        call.denoised.wait()
        if call.answered:
            raise CancelledError("the request was given up")
        if not self.ledger.is_denoised(call.ticket) or self.ledger.denoisers != call.denoisers:
            raise EngineError("the denoiser's process ended unexpectedly")

    def _watch_denoiser(self) -> None:
        """Wake the threads of requests that are denoised, or lost with the denoiser's process."""
        while not self._ended:
            if not self._denoising:
                self._started.wait(0.5)
                self._started.clear()
                continue
            time.sleep(DENOISED_POLL)
            now = self.ledger.denoisers
            with self._denoising_lock:
                ready = [
                    call
                    for call in self._denoising
                    if call.answered or call.denoisers != now or self.ledger.is_denoised(call.ticket)
                ]
                self._denoising = [call for call in self._denoising if call not in ready]
            for call in ready:
                call.denoised.set()

    def _fail(self, call: _Call, error: Exception) -> None:
        if call.answered:
            return
        if isinstance(error, (EngineError, UnavailableError)) and FAULT.search(str(error)):
            logger.error("a request was lost: %s", error)
            error = UnavailableError("a process of the server ended during this request; it is restarted, try again")
        elif not isinstance(error, Flux2Error):
            logger.exception("a request failed", exc_info=error)
        if call.answer(error=error):
            name = "flux2_rejections_total" if isinstance(error, RequestError) else "flux2_failures_total"
            self.counts.add(name, label="invalid" if isinstance(error, RequestError) else "")

    def _release(self, entry: Entry) -> None:
        with self._wake:
            self.admission.drop(entry, left=entry.payload.left)
            self.ledger.close(entry.payload.ticket)
            self._wake.notify()

    def _gauge(self) -> None:
        with self._wake:
            waiting, live = list(self.admission.waiting), list(self.admission.live)
        oldest = max((time.monotonic() - entry.arrived for entry in waiting), default=0.0)
        self.counts.set("flux2_queue_oldest_seconds", oldest)
        self.counts.set("flux2_requests_waiting", len(waiting))
        self.counts.set("flux2_requests_live", len(live))
        sizes = sum(entry.bytes for entry in (*waiting, *live))
        self.counts.set("flux2_bytes_in_flight", sizes + len(live) * self._embed_bytes)
        self.counts.add("flux2_heals_total", self.ledger.heals - self._heals)
        self._heals = self.ledger.heals
