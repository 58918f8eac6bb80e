"""Describe the circumstances of a measurement: the machine, the versions, the commit and the date."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from kit.artifact import tool_versions

PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "torchao", "tritonclient")


def describe() -> dict[str, Any]:
    """Describe this machine's hardware and software, without anything that identifies it."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": tool_versions(*PACKAGES),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    trimmed = {key.strip(): value.strip() for key, value in fields.items()}
    wanted = ("avx512_vnni", "avx512_bf16", "amx_int8")
    return f"{trimmed.get('model name', '?')} ({', '.join(f for f in wanted if f in trimmed.get('flags', '').split())})"


def _commit() -> str:
    root = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
