"""Command `quantize compile`: compile a checkpoint to AOTInductor packages for this machine."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from export.aoti import RECIPES
from export.onnx_command import CHECKPOINT_HELP
from kit.configs import read_variant
from kit.errors import UsageError
from kit.outputs import AOTI, check_out, checkpoint_files
from kit.ports import SERVED_PARTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=f"as in `export onnx`: {CHECKPOINT_HELP}")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder of the artifact")
    parser.add_argument("--sizes", default="1024x1024", metavar="WxH,...", help="image sizes to compile for")
    parser.add_argument("--batches", default="1", metavar="N,...", help="rows per call; other batches are padded")
    parser.add_argument(
        "--recipe", choices=RECIPES, default="bf16", help="number format of the linear layers in the blocks"
    )
    parser.add_argument(
        "--device", default="cuda", metavar="DEVICE", help="cuda or cpu; packages run on this type of device only"
    )
    parser.add_argument("--parts", default=",".join(SERVED_PARTS), metavar="A,B", help="parts to compile")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[=WEIGHT]", help="as in `export onnx`; default: none"
    )
    parser.add_argument("--config", metavar="CHECKPOINT", help="as in `export onnx`; default: none")
    parser.add_argument("--transformer", metavar="FILE", help="as in `export onnx`; default: none")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compile the packages and return a summary of them."""
    parts = tuple(word.strip() for word in args.parts.split(",") if word.strip())
    for part in parts:
        if part not in SERVED_PARTS:
            raise UsageError(f"--parts {part}: cannot be compiled; there are: {', '.join(SERVED_PARTS)}")
    if not all(word.strip().isdigit() for word in args.batches.split(",")):
        raise UsageError(f"--batches {args.batches}: expected comma-separated numbers, for example 1,2,4")
    from export.lora.terms import Lora
    from export.sources import find_sources

    check_out(args.out, AOTI, checkpoint_files(args))  # before anything is downloaded
    loras = tuple(Lora.parse(text) for text in args.lora)
    sources = find_sources(args.checkpoint, parts, args.config, args.transformer)
    from tqdm import tqdm

    from export.aoti.build import AotConfig, Package, buckets, compile_artifact, parse_sizes

    config = AotConfig(
        sizes=parse_sizes(args.sizes),
        batches=tuple(int(word) for word in args.batches.split(",")),
        recipe=args.recipe,
        device=args.device,
        parts=parts,  # checked above
        loras=loras,
        single_files=sources.single_files,
    )
    variant = read_variant(sources.checkpoint)
    total = sum(len(buckets(part, variant, config)) for part in config.parts)
    begin = time.perf_counter()
    with tqdm(total=total, desc="compile", unit="package", disable=not sys.stderr.isatty(), leave=False) as bar:

        def done(package: Package) -> None:
            sizes = ", ".join(f"{axis} {size}" for axis, size in package.sizes.items())
            bar.update()
            bar.write(f"{package.part:<13} {package.seconds:6.1f} s  {sizes}", file=sys.stdout)

        made = compile_artifact(sources.checkpoint, args.out, config, done)
    seconds = time.perf_counter() - begin
    print(f"{args.out}: {variant.name}, {args.recipe}, {len(made)} packages for {args.device} in {seconds:.1f} s")
    return {
        "out": str(args.out),
        "variant": variant.name,
        "recipe": args.recipe,
        "device": args.device,
        "seconds": round(seconds, 1),
        "packages": [
            {"part": p.part, "sizes": dict(p.sizes), "bytes": p.bytes, "seconds": round(p.seconds, 1)} for p in made
        ],
    }
