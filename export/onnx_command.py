"""The command `export onnx`: a checkpoint to an ONNX artifact."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from kit.cli import report
from kit.configs import read_variant
from kit.dtypes import Compute
from kit.errors import UsageError
from kit.ports import ALL_PARTS, PARTS, PartName, parts_of

CHECKPOINT_HELP = "a folder in diffusers layout, a hub id, a variant, `sample`, or a single file with --config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("checkpoint", help=CHECKPOINT_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the artifact to write")
    add_onnx_options(parser)


def add_onnx_options(onnx: argparse.ArgumentParser) -> None:
    """Add what `export onnx` takes beside the checkpoint and the place of the artifact."""
    onnx.add_argument("--parts", metavar="A,B", help=f"of {', '.join(ALL_PARTS)}; default: all that the variant has")
    onnx.add_argument("--dtype", choices=get_args(Compute), default="fp32", help="what the graphs compute in")
    onnx.add_argument(
        "--attention",
        choices=("op", "matmul"),
        default="matmul",
        help="the ONNX Attention operator (TensorRT 10.14 and later) or MatMul-Softmax-MatMul (default)",
    )
    onnx.add_argument(
        "--config", metavar="CHECKPOINT", help="where sizes, tokenizer and other parts of a single file come from"
    )
    onnx.add_argument("--transformer", metavar="FILE", help="a single file in place of the checkpoint's transformer")
    onnx.add_argument("--vae", metavar="FILE", help="a single file in place of the checkpoint's VAE")
    onnx.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[=WEIGHT]",
        help="merge an adapter into the transformer; may be given several times, weight 1 by default",
    )


def parse_parts(text: str) -> tuple[PartName, ...]:
    """Read "a,b" as parts, in the order of the pipeline; raises UsageError for an unknown one."""
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    for word in wanted:
        if word not in ALL_PARTS:
            raise UsageError(f"unknown part {word!r}; there are: {', '.join(ALL_PARTS)}")
    if not wanted:
        raise UsageError(f"--parts names no part; there are: {', '.join(ALL_PARTS)}")
    return tuple(part for part in ALL_PARTS if part in wanted)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Export and print; returns the facts."""
    parts = None if args.parts is None else parse_parts(args.parts)
    from export.lora.terms import Lora
    from export.sources import find_sources

    loras = tuple(Lora.parse(text) for text in args.lora)
    sources = find_sources(args.checkpoint, parts or PARTS, args.config, args.transformer, args.vae)
    from tqdm import tqdm

    from export.artifact import ExportConfig, PartReport, export  # brings torch: only once the arguments make sense
    from export.node_report import summary

    parts = parts or parts_of(read_variant(sources.checkpoint))
    config = ExportConfig(parts, args.dtype, args.attention, loras, sources.single_files)
    with tqdm(total=len(parts), desc="export", unit="part", disable=not sys.stderr.isatty(), leave=False) as bar:

        def done(part: PartReport) -> None:
            weights = f"{part.linked_bytes / 1e6:.1f} MB of weights linked"
            if part.copied_bytes:
                weights += f", {part.copied_bytes / 1e6:.1f} MB copied (no hard links between these file systems)"
            if part.derived_bytes:
                weights += f", {part.derived_bytes / 1e6:.1f} MB written anew"
            bar.update()
            bar.write(
                f"{part.part:<19} {part.seconds:6.1f} s  {part.nodes:>5} nodes  "
                f"{part.graph_bytes / 1e6:5.2f} MB graph, {weights}",
                file=sys.stdout,
            )
            if blocks := summary(part.nodes_traced, part.nodes_exported):
                bar.write(f"{'':<19} {blocks}", file=sys.stdout)

        made = export(sources.checkpoint, args.out, config, done)
    state = "up to date" if made.up_to_date else f"exported in {made.seconds:.1f} s"
    print(f"{made.out}: {made.variant}, {state}")
    return made.facts()


def run_parsed(args: argparse.Namespace) -> int:
    """Export with arguments that another command line has parsed; returns the exit code."""
    args.out = Path(args.out)
    return report(lambda: run(args), args.json)
