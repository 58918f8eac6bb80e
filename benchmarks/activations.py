"""Activation memory by the compiler and by the planner's formulas: klein-4b at fixed sizes, without a GPU.

TensorRT for RTX says how much scratch memory a plan needs. Weights are inputs of the plans, so the checkpoint is a set
of sparse files.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import sparse
from benchmarks.machine import describe
from kit.artifact import read_manifest
from kit.compilers import COMPILERS, activate
from kit.ports import PartName
from kit.recipes import RECIPES
from kit.variants import VARIANTS
from planner.memory import Shape, activation_bytes

VARIANT = VARIANTS["klein-4b"]
ROW = COMPILERS["tensorrt-rtx"]
GPUS = {"fp8": "l4", "bf16": "l4", "int8": "a10g"}
SIDES = (256, 512, 1024, 1536, 2048)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work", type=Path, metavar="DIR", default=Path("build"), help="where a work folder is made; it stays small"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compile every case; returns a row for each."""
    from benchmarks.sparse_quantized import quantize
    from export.artifact import ExportConfig, export

    activate(ROW)
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="activations-", dir=args.work) as scratch:
        folder = Path(scratch)
        sparse.write(VARIANT, folder / "checkpoint")
        export(folder / "checkpoint", folder / "bf16", ExportConfig(dtype="bf16"))
        for recipe in ("fp8", "int8"):
            quantize(folder / "bf16", folder / recipe, RECIPES[recipe])
        rows = [_row(folder, *case) for case in _cases()]
    return {"machine": describe(), "rows": rows}


def table(facts: dict[str, Any]) -> str:
    """Format the rows as lines of text."""
    lines = [f"{'part':<14}{'recipe':<8}{'side':>6}{'batch':>6}{'compiler MB':>13}{'formula MB':>12}{'error':>8}"]
    for row in facts["rows"]:
        error = row["formula"] / row["compiler"] - 1
        lines.append(
            f"{row['part']:<14}{row['recipe']:<8}{row['side']:>6}{row['batch']:>6}{row['compiler'] / 1e6:>13.0f}"
            f"{row['formula'] / 1e6:>12.0f}{error:>8.0%}"
        )
    return "\n".join(lines)


def _cases() -> Iterator[tuple[PartName, str, int, int]]:
    """Yield part, recipe, side and batch; the VAE is the same in every recipe and decodes images one by one."""
    for side in SIDES:
        yield from (("vae_decoder", "fp8", side, 1), ("vae_encoder", "fp8", side, 1))
    for recipe in GPUS:
        yield "text_encoder", recipe, 1024, 1
        yield from (("transformer", recipe, side, 1) for side in (256, 1024, 2048))
    yield "text_encoder", "fp8", 1024, 4
    yield "transformer", "fp8", 1024, 4


def _row(folder: Path, part: PartName, recipe: str, side: int, batch: int) -> dict[str, Any]:
    from runtimes.trt.build.build import build_plan
    from runtimes.trt.build.options import EngineOptions, planned

    artifact = folder / recipe
    manifest = read_manifest(artifact)
    rows = side // 16
    sizes = {"batch": batch, "image_tokens": rows**2, "latent_height": rows, "latent_width": rows}
    axes = planned(manifest, EngineOptions(GPUS[recipe], parts=(part,)))[0].profiles[0].axes
    text = ",".join(f"{axis}={sizes[axis]}" for axis in axes)
    options = EngineOptions(
        GPUS[recipe], parts=(part,), stated={part: (text,)}, compiler="tensorrt-rtx", weights="inputs"
    )
    (plan,) = planned(manifest, options)
    record = manifest.part(part)
    graph, out = artifact / record.graph, folder / "model.plan"
    made = build_plan(plan, graph, record.ports, options, out, None, lambda fraction, phase: None, ROW)
    return {
        "part": part,
        "recipe": recipe,
        "side": side,
        "batch": batch,
        "compiler": made.layers["scratch"],
        "formula": activation_bytes(part, VARIANT, RECIPES[recipe], Shape(side, side, batch)),
    }
