"""The processes of a running tritonserver, as Linux tells of them: which model each runs, and whether it lives."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

STUB = "triton_python_backend_stub"
DEAD = "ZXx"
STOPPED = "Tt"


@dataclass(frozen=True)
class Stub:
    """The process of a Python model."""

    model: str
    pid: int
    state: str  # as in /proc/PID/stat
    born: str = ""  # ticks since the boot, as in /proc/PID/stat; a later process may have the same pid


def state_of(pid: int) -> str:
    """Return the state letter of a process, X if it does not exist."""
    return _stat(pid)[0]


def _stat(pid: int) -> tuple[str, str]:
    """Return the state letter of a process and when it was born."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return words[0], words[19]
    except (OSError, IndexError):
        return "X", ""


def stubs(server: int) -> dict[str, Stub]:
    """Return the living Python models of a tritonserver by name."""
    found = {}
    for pid in _children(server):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words and STUB.encode() in words[0] and len(words) > 1:  # STUB .../MODEL/1/model.py ...
            model, (state, born) = Path(os.fsdecode(words[1])).parts[-3], _stat(pid)
            if state not in DEAD:
                found[model] = Stub(model, pid, state, born)
    return found


class StubWatch:
    """Looks at the same stubs again and again; enumerates the threads of the server only when one of them has gone.

    A model that was loaded again has a new process, so its old one is gone and the server is searched.
    """

    def __init__(self) -> None:
        self._server = 0
        self._known: dict[str, Stub] = {}

    def look(self, server: int, models: Collection[str]) -> dict[str, Stub]:
        """Return what `stubs` returns, at the cost of a file each while all of the models live."""
        known = {model: Stub(model, stub.pid, *_stat(stub.pid)) for model, stub in self._known.items()}
        alive = all(
            model in known and known[model].state not in DEAD and known[model].born == self._known[model].born
            for model in models
        )
        if server != self._server or not alive:
            self._server, known = server, stubs(server)
        self._known = known
        return dict(known)


def _children(pid: int) -> Iterator[int]:
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            yield from map(int, tasks.read_text().split())
        except OSError:
            continue


def end_group(group: int, patience: float) -> None:
    """Wait for a process group to end, then kill what is left of it: stubs outlive a server that crashed."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def end_with_parent() -> None:
    """Ask Linux to interrupt this process when its parent dies, so that a killed launcher leaves no server running."""
    if sys.platform == "linux":
        set_pdeathsig = 1
        ctypes.CDLL(None).prctl(set_pdeathsig, signal.SIGINT)
