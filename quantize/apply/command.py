"""`quantize apply`: quantize an exported artifact by a recipe."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from kit.recipes import RECIPES, find_recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="DIR", help="artifact written by `export onnx`")
    parser.add_argument("--recipe", required=True, metavar="NAME", help=f"{', '.join(RECIPES)}, or a JSON file")
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="record of `quantize calibrate`; default: none, for recipes that need none",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the artifact to write")
    parser.add_argument("--gpu", metavar="NAME", help="reject a recipe that this GPU does not support; default: none")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Quantize the artifact, print each part and return the facts."""
    from kit.gpus import gpu
    from kit.outputs import QUANTIZED, check_out, file_of
    from quantize.calibration import record

    check_out(args.out, QUANTIZED, [args.artifact, args.calibration, file_of(args.recipe)])
    recipe = find_recipe(args.recipe)
    target = gpu(args.gpu) if args.gpu else None
    seen = record.read(args.calibration) if args.calibration else None
    from tqdm import tqdm

    from quantize.apply.apply import apply  # imports torch
    from quantize.apply.write import PartReport

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
        print(f"left out: {', '.join(made.left_out)}: calibration does not cover reference images yet")
    state = "up to date" if made.up_to_date else f"quantized in {time.perf_counter() - begin:.1f} s"
    print(f"{made.out}: recipe {made.recipe}, {state}")
    return made.facts()
