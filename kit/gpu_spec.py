"""What the kit knows about a GPU: compute capability, memory, bandwidth, rates without sparsity, and what it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kit.recipes import Precision, recipe

Generation = Literal["turing", "ampere", "ada", "hopper", "blackwell"]
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
        chosen = recipe(name)
        needed = chosen.math if not self.has(chosen.math) else chosen.compute
        if self.has(needed):
            return None
        major, minor = FIRST_CAPABILITY[needed]
        what = name if needed == chosen.math else f"{name} computes in {needed}, which"
        return (
            f"{what} needs compute capability {major}.{minor} or newer; {self.name} has {self.capability}: "
            f"use --recipe {self.default_recipe}"
        )

    @property
    def default_recipe(self) -> str:
        """The fastest recipe that the tensor cores support: fp8, else int8, else fp32 without bf16."""
        if not self.has("bf16"):
            return "fp32"
        return "fp8" if self.has("fp8") else "int8"


def rates(
    fp32: float, bf16: float | None, int8: float, fp8: float | None = None, fp4: float | None = None
) -> dict[Precision, float]:
    """Convert dense TFLOP/s by format to FLOP/s; formats that the GPU does not support are left out."""
    given: dict[Precision, float | None] = {"fp32": fp32, "bf16": bf16, "int8": int8, "fp8": fp8, "fp4": fp4}
    return {precision: rate * TERA for precision, rate in given.items() if rate is not None}
