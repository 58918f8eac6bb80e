"""Run work in processes of their own: a crash of a C++ library becomes a message, and its memory is given back.

Some graphs end TensorRT for RTX 1.7 with SIGFPE, which no Python code can catch. A child process has its own session,
so that Ctrl-C in a terminal reaches only the parent, which asks its children to stop. A child ends when its parent
does, however the parent ended: their connection is closed then.
"""

from __future__ import annotations

import _thread
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from kit.errors import CheckFailed

Tick = Callable[[float, str], None]  # (fraction done from 0 to 1, current phase)
STOP_SECONDS = 30  # how long a child may take to stop after Ctrl-C
INTERRUPTED = 130


@dataclass(frozen=True)
class Work:
    """A function of a module, and its arguments; all must pickle. It gets a tick as its last argument."""

    name: str  # in messages
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Died(CheckFailed):
    """A child ended without an answer."""

    def __init__(self, work: Work, code: int) -> None:
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        super().__init__(f"{work.name}: its process ended with {how}")
        self.work = work
        self.signal = signal.Signals(-code) if code < 0 else None


@dataclass
class Child:
    """A running child process."""

    place: int
    work: Work
    connection: Connection[Any, Any] = field(init=False)
    process: subprocess.Popen[bytes] = field(init=False)

    def __post_init__(self) -> None:
        self.connection, theirs = Pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", __name__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno() if _has_descriptor(sys.stderr) else None,  # stdout is for results
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        finally:
            theirs.close()
        with suppress(BrokenPipeError, ConnectionResetError):  # its end is noticed when its answer is read
            self.connection.send((self.work.function, self.work.arguments))

    def stop(self) -> None:
        """Ask the child to stop, as by Ctrl-C."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send("stop")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.connection.close()


def run(
    works: Sequence[Work],
    workers: int,
    tick: Callable[[int, float, str], None],
    done: Callable[[int, Any], None],
) -> None:
    """Run works in child processes, `workers` at a time; `tick` and `done` are called here with the place of a work.

    Raises what a work raised, and Died for a child that crashed or was killed; the other children are ended first.
    KeyboardInterrupt stops all of them; a second one, or STOP_SECONDS, kills them.
    """
    waiting = deque(enumerate(works))
    running: dict[Any, Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                child = Child(*waiting.popleft())
                running[child.connection] = child
            for connection in wait(list(running)):
                _listen(running, running[connection], tick, done)
    except KeyboardInterrupt:
        for child in running.values():
            child.stop()
        for child in running.values():
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(STOP_SECONDS)
        raise
    finally:
        for child in running.values():
            child.kill()


def _listen(
    running: dict[Any, Child],
    child: Child,
    tick: Callable[[int, float, str], None],
    done: Callable[[int, Any], None],
) -> None:
    """Act on one message of a child, or on its end."""
    try:
        kind, value = child.connection.recv()
    except (EOFError, ConnectionResetError):
        raise Died(child.work, child.process.wait()) from None
    if kind == "tick":
        tick(child.place, *value)
        return
    if kind == "failed":
        raise value
    child.process.wait()
    child.connection.close()
    del running[child.connection]
    done(child.place, value)


def _has_descriptor(stream: Any) -> bool:
    """Return whether a stream is a file of the system; a stand-in for one, as in tests, is not."""
    try:
        stream.fileno()
    except (OSError, AttributeError, ValueError):
        return False
    return True


def main() -> int:
    """Do the work that the parent sends, and send the result; returns the exit code."""
    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    function, arguments = connection.recv()
    threading.Thread(target=_obey, args=(connection,), daemon=True).start()
    told = -1.0

    def tick(fraction: float, phase: str) -> None:
        nonlocal told
        if fraction - told >= 0.01 or fraction == 1:  # a build reports thousands of steps
            told = fraction
            connection.send(("tick", (fraction, phase)))

    try:
        answer = ("done", function(*arguments, tick))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BaseException as error:
        error.add_note(f"in the child process:\n{traceback.format_exc()}")
        answer = ("failed", error)
    connection.send(answer)
    return 0


def _obey(connection: Connection[Any, Any]) -> None:
    """Interrupt the work when the parent asks for it, and end this process when the parent has ended."""
    try:
        while connection.recv() == "stop":
            _thread.interrupt_main()
    except (EOFError, OSError):
        os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
