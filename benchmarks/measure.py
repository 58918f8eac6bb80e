"""Run a command in a process of its own and let the kernel tell its peak memory.

Between the benchmark and the command stands a small process: what Linux reports as a process's peak includes that of
the one which started it, and a benchmark that has drawn weights is larger than what it measures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass

_STARTER = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
with open(sys.argv[1], "w") as report:
    json.dump({"code": os.waitstatus_to_exitcode(status), "peak": usage.ru_maxrss * 1024,
               "cpu": usage.ru_utime + usage.ru_stime}, report)
"""


@dataclass(frozen=True)
class Measured:
    """What a command took and printed."""

    seconds: float
    cpu_seconds: float  # of all its threads: what it would take on a core of its own, where a machine is shared
    peak_rss_bytes: int
    stdout: str


def measure(command: Sequence[str]) -> Measured:
    """Run a command to its end; its stderr goes on. Raises CalledProcessError when it fails."""
    with tempfile.NamedTemporaryFile("r") as report:
        starter = [sys.executable, "-I", "-S", "-c", _STARTER, report.name, *command]
        begin = time.perf_counter()
        done = subprocess.run(starter, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - begin
        end = json.load(report)
    if end["code"]:
        raise subprocess.CalledProcessError(end["code"], command, done.stdout)
    return Measured(seconds, end["cpu"], end["peak"], done.stdout)
