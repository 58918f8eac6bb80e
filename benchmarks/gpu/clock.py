"""Time calls on a device: warm-up, synchronization on both sides, median, 95th percentile and peak memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

WARM_UPS = 3
FEWEST, MOST = 5, 200


class Unavailable(Exception):
    """A case cannot run here; the reason is recorded in its row."""


def wait(device: str) -> None:
    """Wait until the device has finished all its work."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def clock(call: Callable[[], Any], device: str, seconds: float) -> dict[str, Any]:
    """Time a call; returns median and p95 in seconds, the number of runs and the peak of allocated memory in bytes."""
    for _ in range(WARM_UPS):
        call()
    wait(device)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < FEWEST or (time.perf_counter() < end and len(times) < MOST):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else None
    return {"median": median(times), "p95": percentile(times, 0.95), "runs": len(times), "peak_bytes": peak}


def percentile(values: list[float], share: float) -> float:
    """Return the smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-len(ordered) * share // 1) - 1)]


def describe(device: str) -> dict[str, Any]:
    """Describe the measured device."""
    if not device.startswith("cuda"):
        return {"name": "CPU", "capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    facts = torch.cuda.get_device_properties(device)
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_bytes": facts.total_memory,
        "multiprocessors": facts.multi_processor_count,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
    }
