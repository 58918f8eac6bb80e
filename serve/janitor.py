"""A small process that cleans up after a launcher that was killed; it needs the standard library only.

It reads from its stdin what the launcher made: `group PID`, `prefix NAME` (of files in /dev/shm) and `folder PATH`. The
end of stdin without `done` means that the launcher died.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from pathlib import Path

SHM = Path("/dev/shm")


def remove_shared_memory(prefix: str) -> None:
    """Remove the shared memory of a server that has ended."""
    for path in SHM.glob(f"{prefix}*") if SHM.is_dir() else ():
        path.unlink(missing_ok=True)


def main() -> None:
    """Wait for the launcher, then remove what it left."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN)
    made: dict[str, str] = {}
    for line in sys.stdin:
        word, _, value = line.rstrip("\n").partition(" ")
        if word == "done":
            return
        made[word] = value
    if "group" in made:
        _end(int(made["group"]), float(made.get("patience", "20")))
    if "prefix" in made:
        remove_shared_memory(made["prefix"])
    if "folder" in made:
        shutil.rmtree(made["folder"], ignore_errors=True)


def _end(group: int, patience: float) -> None:
    """Wait for the server, which Linux has interrupted, then kill what is left."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    try:
        os.killpg(group, signal.SIGKILL)
        time.sleep(0.5)
    except ProcessLookupError:
        return


if __name__ == "__main__":
    main()
