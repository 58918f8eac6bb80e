"""Run exports that are killed, one at each file system operation; a separate program because it forks.

    python -m tests.export.killed_export CHECKPOINT ADAPTER FOLDER SEED

The parts are traced once, then a child is forked for every event. At the n-th event the child sends itself SIGKILL,
immediately or a moment later, during the operation that the event started. Prints one JSON object with the number of
events of an uninterrupted export and, for each child, how it ended.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from export.artifact import ExportConfig, export
from export.lora.terms import Lora
from export.trace import FakePart
from kit.configs import read_variant
from kit.ports import PartName

EVENTS = {"open", "os.link", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.copyfile"}
KILLED_PARTS: tuple[PartName, ...] = ("transformer", "vae_decoder")
MOMENT = 0.004  # seconds; about the duration of the longest write


def run(config: ExportConfig, checkpoint: Path, out: Path, last: int | None, delay: float) -> int:
    """Export to the end, or up to the event `last`; returns the number of events."""
    count = 0

    def kill() -> None:
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in EVENTS or str(out.parent) not in str(arguments[0]) + str(arguments[1:2]):
            return
        count += 1
        if count == last:
            threading.Thread(target=kill).start() if delay else kill()

    sys.addaudithook(hook)
    export(checkpoint, out, config)
    return count


def main() -> None:
    checkpoint, adapter, folder, seed = (*map(Path, sys.argv[1:4]), int(sys.argv[4]))
    config = ExportConfig(KILLED_PARTS, loras=(Lora(adapter),))
    variant = read_variant(checkpoint)
    traced = {part: FakePart(part, variant, "fp32", "matmul").trace() for part in KILLED_PARTS}
    FakePart.trace = lambda self: traced[self.part]  # type: ignore[method-assign]  # a forked child has its own
    chosen = random.Random(seed)
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.write(writing, str(run(config, checkpoint, folder / "whole" / "out", None, 0)).encode())
        os._exit(0)
    os.wait()
    events = int(os.read(reading, 100))
    ends = []
    for n in range(1, events + 1):
        delay = chosen.choice((0.0, chosen.uniform(0, MOMENT)))
        place = folder / str(n)
        place.mkdir()
        child = os.fork()
        if child == 0:
            run(config, checkpoint, place / "out", n, delay)
            time.sleep(2 * MOMENT)  # so that a child to be killed at the very end is killed
            os._exit(0)
        ends.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(json.dumps({"events": events, "ends": ends}))


if __name__ == "__main__":
    main()
