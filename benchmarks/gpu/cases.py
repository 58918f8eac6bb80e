"""List the measured cases, most important first, so that an interrupted run has measured the most important ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from itertools import product
from typing import Literal

from kit.errors import UsageError
from kit.ports import SERVED_PARTS
from kit.variants import TextEncoder, Transformer, Vae, Variant

Size = Literal["true", "tiny"]
Grid = Literal["short", "full"]
Launch = Literal["graphs", "calls"]
What = Literal["ceiling", "attention", "part", "image", "fusion", "dev", "batching"]

OTHER_PARTS = tuple(part for part in SERVED_PARTS if part != "transformer")
PLAIN_MODES = ("diffusers", "eager", "compile", "graphs")
QUANTIZED_MODES = ("fp8", "int8", "int8-weights")
TORCHAO_MODES = ("fp8-torchao", "int8-torchao", "int8-weights-torchao", "int4-weights-torchao")
PART_MODES = (*PLAIN_MODES, *QUANTIZED_MODES, *TORCHAO_MODES, "whole", "aoti", "aoti-fp8")
IMAGE_MODES = ("diffusers", "eager", "compile", "graphs", "fp8", "int8")
FUSIONS = ("plain", "qkv", "prepared", "both")
KERNELS = ("default", "flash", "cudnn", "efficient", "math", "flex", "fp8")
SIDES = {"true": (1024, 512, 2048), "tiny": (64, 48)}  # of square images, most important first
BATCHES = {"true": (1, 8, 2, 4), "tiny": (1, 2)}


@dataclass(frozen=True)
class RunSettings:
    """The settings shared by all cases of a run."""

    variant: str = "klein-4b"
    device: str = "cuda"
    size: Size = "true"
    launch: Launch = "graphs"  # for compiled and quantized modes; a CPU supports calls only
    backend: str = "inductor"  # torch.compile backend
    seconds: float = 1.0  # duration of timed runs per case
    steps: int = 4
    requests: int = 60  # number of requests of the batching case


@dataclass(frozen=True)
class Case:
    """One measurement: a row of the table."""

    what: What
    subject: str
    mode: str
    side: int = 0  # side of a square image
    batch: int = 1

    @property
    def id(self) -> str:
        shape = f"/{self.side}x{self.side}/b{self.batch}" if self.side else ""
        return f"{self.what}/{self.subject}/{self.mode}{shape}"

    @property
    def group(self) -> tuple[str, str, str]:
        """Return the key of cases that share a setup and weights in one process."""
        return self.what, self.subject, self.mode


def cases(size: Size, grid: Grid) -> list[Case]:
    """List all cases once, most important first."""
    return list(dict.fromkeys(_ordered(size, grid)))


def _ordered(size: Size, grid: Grid) -> Iterator[Case]:
    (main, small, *_), (_, most, *_) = SIDES[size], BATCHES[size]
    for subject in ("bf16", "fp8", "int8", "copy"):
        yield Case("ceiling", subject, "matmul" if subject != "copy" else "memory")
    for mode in PART_MODES:
        yield Case("part", "transformer", mode, main)
    for mode in IMAGE_MODES:
        yield Case("image", "whole", mode, main)
    for mode in KERNELS:
        yield Case("attention", "head128", mode, main)
    for part in OTHER_PARTS:
        for mode in PLAIN_MODES:
            yield Case("part", part, mode, main)
    for fusion in FUSIONS:
        yield Case("fusion", "transformer", fusion, main)
    for mode in ("bf16", "fp8"):
        yield Case("dev", "blocks", mode, main)
        yield Case("dev", "whole", mode, main)
    for mode, batch in product(("diffusers", "graphs", "fp8"), (1, most)):
        yield Case("image", "whole", mode, small, batch)
        yield Case("part", "transformer", mode, small, batch)
    for mode in ("one-by-one", "step-level"):
        yield Case("batching", "mixed-steps", mode, small, most)
    modes = ("diffusers", "graphs", "fp8") if grid == "short" else PART_MODES
    for mode, side, batch in product(modes, SIDES[size], BATCHES[size]):
        if grid == "full" or side * side * batch <= 4 * main * main:
            yield Case("part", "transformer", mode, side, batch)
    if grid == "full":
        for mode, side, batch in product(IMAGE_MODES, SIDES[size], BATCHES[size]):
            yield Case("image", "whole", mode, side, batch)
        for part, mode, side, batch in product(OTHER_PARTS, PLAIN_MODES, SIDES[size], BATCHES[size]):
            yield Case("part", part, mode, side if part == "vae_decoder" else main, batch)


def chosen(found: list[Case], patterns: str | None) -> list[Case]:
    """Keep the cases whose id matches one of the comma-separated patterns; raises UsageError if none matches."""
    if patterns is None:
        return found
    words = [word.strip() for word in patterns.split(",")]
    for word in words:
        if not any(fnmatch(case.id, word) for case in found):
            examples = ", ".join(case.id for case in found[:: max(1, len(found) // 4)][:4])
            raise UsageError(f"--only {word}: no case matches; examples of ids: {examples}")
    return [case for case in found if any(fnmatch(case.id, word) for word in words)]


def variant_of(settings: RunSettings) -> Variant:
    """Return the variant at its real size, or reduced so that a dry run on a CPU takes seconds."""
    variant = Variant.named(settings.variant)
    return variant if settings.size == "true" else shrink(variant)


def shrink(variant: Variant) -> Variant:
    """Reduce widths and depths; everything that shapes a graph is unchanged."""
    text: TextEncoder = replace(
        variant.text_encoder, hidden=32, layers=4, heads=4, kv_heads=2, head_dim=16, ffn=64, vocab=512, taps=(1, 2, 3)
    )
    sizes: Transformer = replace(
        variant.transformer, double_blocks=1, single_blocks=2, heads=2, head_dim=32, joint_dim=96, rope_axes=(8,) * 4
    )
    vae = Vae(channels=(8, 16, 32, 32), decoder_channels=(8, 16, 32, 32), layers_per_block=1, norm_groups=8)
    return replace(variant, transformer=sizes, text_encoder=text, vae=vae, text_tokens=128)
