"""Run a command in a separate process and read its peak memory from the kernel.

A small process is placed between the benchmark and the command: on Linux, the reported peak of a process includes that
of the process that started it, and a benchmark that has drawn weights is larger than the command it measures.
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
    """Cost and output of a command."""

    seconds: float
    cpu_seconds: float  # of all threads: the duration on a single exclusive core
    peak_rss_bytes: int
    stdout: str


def measure(command: Sequence[str]) -> Measured:
    """Run a command to completion; its stderr is passed through. Raises CalledProcessError if it fails."""
    with tempfile.NamedTemporaryFile("r") as report:
        starter = [sys.executable, "-I", "-S", "-c", _STARTER, report.name, *command]
        begin = time.perf_counter()
        done = subprocess.run(starter, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - begin
        end = json.load(report)
    if end["code"]:
        raise subprocess.CalledProcessError(end["code"], command, done.stdout)
    return Measured(seconds, end["cpu"], end["peak"], done.stdout)
