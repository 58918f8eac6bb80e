"""Measure mixed precision on the sample: the Pareto front of a recipe, and the predicted order of the groups.

python -m export onnx sample --out build/sample
python -m quantize calibrate sample --prompts sample:32 --batch 8 --dtype fp32 --out build/cal.json
python -m benchmarks search --save benchmarks/results/search_sample.json
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks import machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--artifact", type=Path, default=Path("build/sample"), metavar="DIR", help="what is quantized")
    parser.add_argument(
        "--checkpoint", default="sample", metavar="CHECKPOINT", help="what the artifact was exported from"
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        default=Path("build/cal.json"),
        metavar="FILE",
        help="what `quantize calibrate` wrote",
    )
    parser.add_argument("--recipe", default="int8", metavar="NAME", help="what is quantized unless it is spared")
    parser.add_argument("--prompts", default="sample:24", metavar="SET", help="kit, kit:N, sample:N, or a file")
    parser.add_argument("--samples", type=int, default=24, metavar="N", help="prompts for measuring effects")
    parser.add_argument("--points", type=int, default=5, metavar="N", help="recipes of the front that are drawn")
    parser.add_argument("--alone", type=int, default=24, metavar="N", help="number of groups to measure alone")
    parser.add_argument("--meet", default="psnr=55", metavar="METRIC=VALUE", help="the quality to meet")
    parser.add_argument(
        "--out", type=Path, default=Path("build/search"), metavar="DIR", help="for recipes, table, JSON and plot"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the search as a user would; its plot is saved next to the JSON file of `--save`."""
    from quantize.search import command as search_command

    parser = argparse.ArgumentParser()
    search_command.add_arguments(parser)
    named = ("checkpoint", "calibration", "recipe", "prompts", "samples", "points", "alone", "meet", "out")
    options = [word for name in named for word in (f"--{name}", str(getattr(args, name)))]
    search_command.run(parser.parse_args([str(args.artifact), *options, "--batch", "8"]))
    if args.save is not None:
        shutil.copyfile(args.out / "search.png", args.save.with_suffix(".png"))
    return {"benchmark": "search", "machine": machine.describe(), **json.loads((args.out / "search.json").read_text())}


def table(facts: dict[str, Any]) -> str:
    """Report the chosen result; the search has printed its tables."""
    return f"chosen: {facts['chosen'] or 'nothing'}; rank correlations: {facts['rank_correlation']}"
