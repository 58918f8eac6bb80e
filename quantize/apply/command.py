"""`quantize apply`: an exported artifact becomes a quantized one."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from quantize.recipes import RECIPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="DIR", help="what `export onnx` made")
    parser.add_argument("--recipe", required=True, metavar="NAME", help=f"{', '.join(RECIPES)}, or a JSON file")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="what `quantize calibrate` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the artifact to write")
    parser.add_argument("--gpu", metavar="NAME", help="refuse a recipe that this GPU has no hardware for")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Quantize; returns what was done, with bytes per second."""
    from kit.gpus import gpu
    from quantize.calibration import record
    from quantize.recipes import find_recipe

    recipe = find_recipe(args.recipe)
    target = gpu(args.gpu) if args.gpu else None
    seen = record.read(args.calibration) if args.calibration else None
    from tqdm import tqdm

    from quantize.apply.apply import PartReport, apply  # brings torch

    with tqdm(unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:

        def start(part: str, total: int) -> Any:
            bar.reset(total)
            bar.set_description(part)
            return bar.update

        def done(part: PartReport) -> None:
            layers = ", ".join(f"{count} {scheme}" for scheme, count in part.schemes.items() if count)
            bar.write(
                f"{part.part:<13} {part.seconds:6.1f} s  {part.source_bytes / 1e6:9.1f} MB read, "
                f"{part.written_bytes / 1e6:.1f} MB written, {part.source_bytes / part.seconds / 1e6:.0f} MB/s; "
                f"layers: {layers}; {part.smoothed} inputs smoothed",
                file=sys.stdout,
            )

        begin = time.perf_counter()
        made = apply(args.artifact, args.out, recipe, seen, target, start, done)
    if made.left_out:
        print(f"left out: {', '.join(made.left_out)}: no calibration covers reference images yet")
    state = "up to date" if made.up_to_date else f"quantized in {time.perf_counter() - begin:.1f} s"
    print(f"{made.out}: recipe {made.recipe}, {state}")
    return made.facts()
