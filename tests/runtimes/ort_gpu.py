"""ONNX Runtime for GPUs, unpacked beside the environment: its libraries, and processes that import it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "reference" / "onnxruntime-gpu"
REASON = f"{FOLDER}: no onnxruntime-gpu; `make env` fetches it where the package index can be reached"
needs_ort_gpu = pytest.mark.skipif(not (FOLDER / "onnxruntime").is_dir(), reason=REASON)


def library(name: str) -> bytes:
    return (FOLDER / "onnxruntime" / "capi" / f"libonnxruntime_providers_{name}.so").read_bytes()


def run(code: str, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that finds packages in `folders` before its own."""
    path = os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
