"""GPUs that the kit does not build for but that have public measurements, used to calibrate the planner."""

from __future__ import annotations

from collections.abc import Mapping

from kit.errors import UsageError
from kit.gpus import GB, GPUS, Gpu, rates

BOARDS: Mapping[str, Gpu] = {
    board.name: board
    for board in (
        Gpu(
            "l20",
            "NVIDIA L20 48 GB",
            (8, 9),
            "ada",
            275,
            48 * GB,
            48 * GB,
            864 * GB,
            rates(59.8, 119.5, 239, fp8=239),
            "NVIDIA L20 datasheet (2023): half the tensor rate of an L40S",
        ),
        Gpu(
            "rtx6000ada",
            "NVIDIA RTX 6000 Ada 48 GB",
            (8, 9),
            "ada",
            300,
            48 * GB,
            48 * GB,
            960 * GB,
            rates(91.1, 364.2, 728.5, fp8=728.5),
            "NVIDIA RTX 6000 Ada datasheet (2022): 1,457 with sparsity",
        ),
        Gpu(
            "rtx4000ada",
            "NVIDIA RTX 4000 Ada 20 GB",
            (8, 9),
            "ada",
            130,
            20 * GB,
            20 * GB,
            360 * GB,
            rates(26.7, 106.9, 213.8, fp8=213.8),
            "NVIDIA RTX 4000 Ada datasheet (2023): 427.6 with sparsity",
        ),
        Gpu(
            "gb300",
            "NVIDIA GB300 288 GB",
            (10, 3),
            "blackwell",
            1400,
            288 * GB,
            288 * GB,
            8000 * GB,
            rates(80, 2500, 165, fp8=5000, fp4=15000),
            "NVIDIA GB300 NVL72 datasheet (2025), per GPU; INT8 was cut",
        ),
    )
}


def board(name: str) -> Gpu:
    """Look up a GPU of the kit or one that is only used for measurements."""
    known = {**GPUS, **BOARDS}
    if name not in known:
        raise UsageError(f"unknown board {name!r}; there are: {', '.join(known)}")
    return known[name]
