"""Keep a server serving: notice processes that died or were stopped, heal them, and say so in health meanwhile.

Triton restarts nothing, and its health does not see a model whose process is gone. So its processes are watched through
/proc. A dead model is unloaded and loaded again; Triton's health says "not ready" from then on until it serves. If that
fails, or if tritonserver itself died, the whole server is restarted. Requests that wait in the front model survive
the former. The models that answer clients directly are an exception: Triton never answers what they were working on, so
their death restarts the server too.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

from kit.errors import CheckFailed, Flux2Error
from serve.ledger import Ledger, State
from serve.processes import STOPPED, StubWatch, state_of, stubs
from serve.wire import DENOISER, FRONT, STREAM

logger = logging.getLogger(__name__)
PERIOD = 0.1  # seconds between two looks
STOPS = 3  # times that a stopped process is continued within `WINDOW` before it is killed
WINDOW = 10.0
RESTARTS = 5  # of the server within a minute without an image for a client between them; then it is given up
BLAME_SECONDS = 600.0  # two deaths that are further apart have nothing to do with each other
PROBE_EVERY = 30.0  # seconds without requests after which the known answer is requested
STALL = 60.0  # seconds without a step or an image while requests are in flight


class Supervised(Protocol):
    """The server, as the supervisor needs it: serve.launch.Server."""

    ledger: Ledger
    probe_seconds: float
    python_models: list[str]  # which must have a process each

    @property
    def pid(self) -> int: ...
    def exit_code(self) -> int | None: ...
    def interrupt(self) -> None: ...
    def reload(self, model: str) -> None: ...
    def restart(self) -> None: ...
    def wait_until_ready(self) -> None: ...
    def probe_again(self) -> None: ...


class Supervisor:
    """Watches one server from a thread; `on_event` receives a sentence for each thing that happened."""

    def __init__(self, server: Supervised, on_event: Callable[[str], None]) -> None:
        self.server = server
        self.on_event = on_event
        self.failed: Flux2Error | None = None
        self._stubs = StubWatch()
        self._stops: dict[int, deque[float]] = {}
        self._restarts: deque[float] = deque(maxlen=RESTARTS)
        self._served = 0  # requests before and by the latest restart
        self._suspects: tuple[float, set[int]] = (0.0, set())
        self._progress: tuple[object, float] = (None, time.monotonic())
        self._quiet, self._idle, self._finished = threading.Event(), threading.Event(), threading.Event()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._run, self._keep_awake)]
        for thread in self._threads:
            thread.start()

    def release(self) -> None:
        """Stop healing, because the server is to end; returns when no healing is under way."""
        self._quiet.set()
        if not self._idle.wait(2):  # a start is under way that nobody needs any more
            self.server.interrupt()
            self._idle.wait(60)

    def finish(self) -> None:
        """End the thread, when the server has ended: Linux interrupts a server whose starting thread ends."""
        self._finished.set()
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        self._watch()
        self._idle.set()
        self._finished.wait()

    def _keep_awake(self) -> None:
        """Continue processes that were stopped, even while the other thread starts a server."""
        watch = StubWatch()
        while not self._finished.wait(PERIOD):
            try:
                pid = self.server.pid
                if state_of(pid) in STOPPED:
                    self._wake("tritonserver", pid)
                for stub in watch.look(pid, self.server.python_models).values():
                    if stub.state in STOPPED:
                        self._wake(stub.model, stub.pid)
            except OSError:  # it ended between two looks
                continue

    def _watch(self) -> None:
        while not self._quiet.wait(PERIOD):
            try:
                self._look()
            except Flux2Error as error:
                self._give_up(error)
                return
            except Exception as error:
                logger.exception("the supervisor failed")
                self._give_up(CheckFailed(f"the supervisor failed: {error}"))
                return

    def _give_up(self, error: Flux2Error) -> None:
        self.failed = error
        self._quiet.set()

    def _look(self) -> None:
        server = self.server
        if (code := server.exit_code()) is not None:
            self._restart(f"tritonserver ended with code {code}")
            return
        found = self._stubs.look(server.pid, server.python_models)
        for model in server.python_models:
            if model not in found:
                self._heal(model)
                return
        self._check_progress()

    def _wake(self, name: str, pid: int) -> None:
        """Continue a stopped process; one that is stopped again and again is killed and then healed."""
        now = time.monotonic()
        stops = self._stops.setdefault(pid, deque(maxlen=STOPS))
        if len(stops) == STOPS and now - stops[0] < WINDOW:
            os.kill(pid, signal.SIGKILL)
            self.on_event(f"the process of {name} (pid {pid}) was stopped {STOPS + 1} times and has been killed")
            return
        stops.append(now)
        os.kill(pid, signal.SIGCONT)
        self.on_event(f"the process of {name} (pid {pid}) was stopped and has been continued")

    def _heal(self, model: str) -> None:
        """Load a model again whose process is gone."""
        server, start = self.server, time.monotonic()
        self._blame()
        if model in (FRONT, STREAM):  # clients wait for answers that only this process could have sent
            self._restart(f"the process of {model} died")
            return
        if model == DENOISER:
            server.ledger.count_denoiser()
        server.ledger.state = State.HEALING
        try:
            try:
                server.reload(model)
                self._wait_for_stub(model)
                server.wait_until_ready()
            finally:
                server.ledger.state = State.SERVING
            server.probe_again()
        except Flux2Error as error:
            if not self._quiet.is_set():
                self._restart(f"{model} could not be loaded again ({error})")
            return
        server.ledger.count_heal()
        self.on_event(f"the process of {model} died; it serves again after {time.monotonic() - start:.1f} s")

    def _wait_for_stub(self, model: str) -> None:
        deadline = time.monotonic() + 5
        while model not in stubs(self.server.pid):
            if time.monotonic() > deadline:
                raise CheckFailed("it has no process")
            time.sleep(0.02)

    def _restart(self, why: str) -> None:
        server, start, reason = self.server, time.monotonic(), why
        self._blame()
        if server.ledger.served > self._served:  # restarting it has helped
            self._restarts.clear()
        while True:
            if len(self._restarts) == RESTARTS and start - self._restarts[0] < 60:
                raise CheckFailed(f"{why}; it was restarted {RESTARTS} times within a minute, which did not help")
            self._restarts.append(time.monotonic())
            try:
                server.restart()
                break
            except Flux2Error as error:
                if self._quiet.is_set():
                    return
                why = f"{reason}; then {str(error).partition(chr(10))[0].partition('; the end of')[0]}"
        server.ledger.count_heal()
        self._served = server.ledger.served
        self._stops.clear()
        self.on_event(f"{why}; the server serves again after {time.monotonic() - start:.1f} s")

    def _blame(self) -> None:
        """Find the request that ended two processes: the only one that was in flight both times."""
        now, flying = time.monotonic(), self.server.ledger.in_flight()
        then, suspects = self._suspects
        guilty = suspects & flying if now - then < BLAME_SECONDS else set()
        if len(guilty) == 1:
            self.server.ledger.refuse(guilty.pop())
            self.on_event("a request was in flight each time that a process died; it will be rejected from now on")
            self._suspects = (0.0, set())
        elif flying:
            self._suspects = (now, flying)

    def _check_progress(self) -> None:
        """Probe a server without requests now and then, and restart one whose requests do not advance."""
        server, now = self.server, time.monotonic()
        progress = server.ledger.fingerprint()
        if progress != self._progress[0]:
            self._progress = (progress, now)
            return
        still = now - self._progress[1]
        if server.ledger.in_flight():
            if still > max(STALL, 20 * server.probe_seconds):
                self._restart(f"no request advanced for {still:.0f} s")
        elif still > max(PROBE_EVERY, 50 * server.probe_seconds):
            self._progress = (None, now)
            try:
                server.probe_again()
            except Flux2Error as error:
                self._restart(f"the known answer failed ({error})")
