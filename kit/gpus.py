"""Specifications of the supported GPUs: compute capability, memory, bandwidth and rates without sparsity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kit.errors import UsageError
from kit.recipes import Precision, recipe

Generation = Literal["ampere", "ada", "hopper", "blackwell"]
GB = 10**9
MIB = 2**20
TERA = 10**12

# The first compute capability whose tensor cores support a format.
FIRST_CAPABILITY: Mapping[Precision, tuple[int, int]] = {
    "fp32": (0, 0),
    "bf16": (8, 0),
    "int8": (7, 2),
    "fp8": (8, 9),
    "fp4": (10, 0),
}


@dataclass(frozen=True)
class Gpu:
    """One GPU as specified by its vendor; `dense` holds FLOP/s without sparsity, with fp32 accumulation."""

    name: str  # as on the command line
    title: str
    compute_capability: tuple[int, int]
    generation: Generation
    watts: int  # power limit of the board, which bounds small boards
    nominal_bytes: int  # as sold
    memory_bytes: int  # as the driver reports it (nvidia-smi), before CUDA takes its share
    bandwidth: float  # bytes/s
    dense: Mapping[Precision, float]
    source: str  # of the rates; memory_bytes: nvidia-smi totals in modal-labs/modal-client#2797, TensorRT-LLM#10278
    preview: bool = False  # specifications only: no recipe was tuned for it
    cuda_names: tuple[str, ...] = ()  # substrings of the driver's name, most specific first

    @property
    def precisions(self) -> tuple[Precision, ...]:
        """Formats that the tensor cores support."""
        return tuple(self.dense)

    @property
    def capability(self) -> str:
        return f"{self.compute_capability[0]}.{self.compute_capability[1]}"

    def has(self, precision: Precision) -> bool:
        return precision in self.dense

    def refusal(self, name: str) -> str | None:
        """Return why a recipe cannot run on this GPU and what to use instead; None if it can."""
        needed = recipe(name).math
        if self.has(needed):
            return None
        major, minor = FIRST_CAPABILITY[needed]
        return (
            f"{name} needs compute capability {major}.{minor} or newer; {self.name} has {self.capability}: "
            f"use --recipe {self.default_recipe}"
        )

    @property
    def default_recipe(self) -> str:
        """The fastest recipe that the tensor cores support: fp8, else int8."""
        return "fp8" if self.has("fp8") else "int8"


def rates(
    fp32: float, bf16: float, int8: float, fp8: float | None = None, fp4: float | None = None
) -> dict[Precision, float]:
    """Convert dense TFLOP/s by format to FLOP/s; formats that the GPU does not support are left out."""
    given: dict[Precision, float | None] = {"fp32": fp32, "bf16": bf16, "int8": int8, "fp8": fp8, "fp4": fp4}
    return {precision: rate * TERA for precision, rate in given.items() if rate is not None}


GPUS: Mapping[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu(
            "l4",
            "NVIDIA L4 24 GB",
            (8, 9),
            "ada",
            72,
            24 * GB,
            23034 * MIB,
            300 * GB,
            rates(30.3, 121, 242.5, fp8=242.5),
            "NVIDIA L4 datasheet (2023): 242 / 485 / 485 with sparsity, 72 W",
            cuda_names=("NVIDIA L4",),
        ),
        Gpu(
            "a10g",
            "NVIDIA A10G 24 GB",
            (8, 6),
            "ampere",
            300,
            24 * GB,
            23028 * MIB,
            600 * GB,
            rates(35, 70, 140),
            "NVIDIA A10G datasheet (2021): 70 / 140 dense; the A10 is another card (125 / 250)",
            cuda_names=("NVIDIA A10G",),
        ),
        Gpu(
            "a100-40g",
            "NVIDIA A100 40 GB SXM",
            (8, 0),
            "ampere",
            400,
            40 * GB,
            40960 * MIB,
            1555 * GB,
            rates(19.5, 312, 624),
            "NVIDIA A100 datasheet (2021)",
            cuda_names=("A100-SXM4-40GB", "A100-PCIE-40GB"),
        ),
        Gpu(
            "a100-80g",
            "NVIDIA A100 80 GB SXM",
            (8, 0),
            "ampere",
            400,
            80 * GB,
            81920 * MIB,
            2039 * GB,
            rates(19.5, 312, 624),
            "NVIDIA A100 datasheet (2021)",
            cuda_names=("A100-SXM4-80GB", "A100 80GB PCIe"),
        ),
        Gpu(
            "l40s",
            "NVIDIA L40S 48 GB",
            (8, 9),
            "ada",
            350,
            48 * GB,
            46068 * MIB,
            864 * GB,
            rates(91.6, 362, 733, fp8=733),
            "NVIDIA L40S datasheet (2023)",
            cuda_names=("NVIDIA L40S",),
        ),
        Gpu(
            "h100",
            "NVIDIA H100 80 GB SXM",
            (9, 0),
            "hopper",
            700,
            80 * GB,
            81559 * MIB,
            3350 * GB,
            rates(67, 989, 1979, fp8=1979),
            "NVIDIA H100 datasheet (2023): 1,979 / 3,958 with sparsity",
            cuda_names=("NVIDIA H100 80GB HBM3", "NVIDIA H100"),
        ),
        Gpu(
            "h200",
            "NVIDIA H200 141 GB SXM",
            (9, 0),
            "hopper",
            700,
            141 * GB,
            143771 * MIB,
            4800 * GB,
            rates(67, 989, 1979, fp8=1979),
            "NVIDIA H200 datasheet (2024): the H100's rates, more and faster memory",
            cuda_names=("NVIDIA H200",),
        ),
        Gpu(
            "rtx4090",
            "NVIDIA GeForce RTX 4090 24 GB",
            (8, 9),
            "ada",
            450,
            24 * GB,
            24564 * MIB,
            1008 * GB,
            rates(82.6, 165.2, 660.6, fp8=330.3),
            "NVIDIA Ada whitepaper (2022): bf16 and FP8 with fp32 accumulation run at half the headline rate",
            cuda_names=("NVIDIA GeForce RTX 4090",),
        ),
        Gpu(
            "b200",
            "NVIDIA B200 180 GB SXM",
            (10, 0),
            "blackwell",
            1000,
            180 * GB,
            183359 * MIB,
            7700 * GB,
            rates(75, 2250, 4500, fp8=4500, fp4=9000),
            "NVIDIA HGX B200 datasheet (2025), per GPU",
            preview=True,
            cuda_names=("NVIDIA B200",),
        ),
    )
}


def gpu(name: str) -> Gpu:
    """Look up a GPU by name; raises UsageError that lists the known names."""
    if name not in GPUS:
        raise UsageError(f"unknown gpu {name!r}; there are: {', '.join(GPUS)}")
    return GPUS[name]


def of_device(device_name: str, memory_bytes: int) -> Gpu | None:
    """Find a GPU by the name and memory that the driver reports; None if it is not listed."""
    fits = [g for g in GPUS.values() if any(word in device_name for word in g.cuda_names)]
    fits = [g for g in fits if abs(g.memory_bytes - memory_bytes) < 0.1 * g.memory_bytes]
    return max(fits, key=lambda g: max(len(w) for w in g.cuda_names if w in device_name), default=None)
