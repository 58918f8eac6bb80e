"""Measure the card's ceilings: the fastest matrix product in each format, and the memory bandwidth.

Operands are random: zeros and constants draw less power and run up to a seventh faster, which no model benefits from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.cases import Case, RunSettings
from benchmarks.gpu.clock import Unavailable, clock
from benchmarks.gpu.parts import Measure
from export.aoti.linears import FP8, FP8_MAX, INT8_MAX, to_rows

SIDES = {"true": (4096, 8192, 16384), "tiny": (64, 128)}  # sides of square products; the fastest is the ceiling
COPY_BYTES = {"true": 4 << 30, "tiny": 1 << 20}


def open_ceiling(settings: RunSettings, subject: str, _: str) -> Measure:
    """Measure one format, or copies in memory."""

    def measure(case: Case) -> dict[str, Any]:
        if subject == "copy":
            return copy(settings)
        tried = []
        for side in SIDES[settings.size]:
            timed = clock(product(subject, side, settings.device), settings.device, settings.seconds)
            tried.append(timed | {"side_of_matrices": side, "flops": 2.0 * side**3})
        return max(tried, key=lambda row: row["flops"] / row["median"])

    return measure


def product(subject: str, side: int, device: str) -> Callable[[], Any]:
    """Return a call that multiplies two random square matrices in a format."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    if subject == "bf16":
        return lambda: a @ b.t()
    if subject == "fp8":
        if device.startswith("cuda") and torch.cuda.get_device_capability() < (8, 9):
            raise Unavailable("fp8 needs compute capability 8.9 or newer")
        (a8, scale_a), (b8, scale_b) = to_rows(a, FP8_MAX, FP8), to_rows(b, FP8_MAX, FP8)
        return lambda: torch._scaled_mm(
            a8, b8.t(), scale_a=scale_a, scale_b=scale_b.t(), out_dtype=torch.bfloat16, use_fast_accum=True
        )
    (a8, _), (b8, _) = to_rows(a, INT8_MAX, torch.int8), to_rows(b, INT8_MAX, torch.int8)
    return lambda: torch._int_mm(a8, b8.t())


def copy(settings: RunSettings) -> dict[str, Any]:
    """Time a copy within the device's memory, counting bytes read and written."""
    source = torch.empty(COPY_BYTES[settings.size], dtype=torch.uint8, device=settings.device).random_()
    target = torch.empty_like(source)
    timed = clock(lambda: target.copy_(source), settings.device, settings.seconds)
    return timed | {"bytes_moved": 2.0 * source.numel()}
