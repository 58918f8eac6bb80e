"""NVIDIA's TensorRT for RTX, unpacked beside the environment: a real compiler that needs no GPU."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

VERSION = "1.7.1.116"
FOLDER = Path(sys.prefix) / "tensorrt" / f"rtx-{VERSION}"
REASON = f"{FOLDER}: no TensorRT for RTX; `make env` fetches it where the package index can be reached"


def is_installed() -> bool:
    return (FOLDER / "tensorrt_rtx_bindings").is_dir()


needs_rtx = pytest.mark.skipif(not is_installed(), reason=REASON)


def run(*words: str, timeout: int = 280, file_bytes: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command of the kit in a process of its own that finds the compiler.

    `file_bytes` is the largest file that it and its children can write, in place of a full disk.
    """

    def limit() -> None:
        if file_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write then fails
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return subprocess.run(
        _command(words),
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        preexec_fn=limit,
    )


def start(*words: str) -> subprocess.Popen[str]:
    """Start a command of the kit as `run` does, and return while it runs."""
    pipe = subprocess.PIPE
    return subprocess.Popen(_command(words), env=_environment(), stdout=pipe, stderr=pipe, text=True)


def _command(words: tuple[str, ...]) -> list[str]:
    return [sys.executable, "-m", *words]


def _environment() -> dict[str, str]:
    path = os.pathsep.join([str(FOLDER), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path}
