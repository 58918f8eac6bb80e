"""Command `export onnx`: export a checkpoint to an ONNX artifact."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args

from kit.cli import report
from kit.configs import read_variant
from kit.dtypes import Compute
from kit.errors import UsageError
from kit.outputs import ONNX, check_out, checkpoint_files
from kit.ports import ALL_PARTS, PARTS, PartName, parts_of

CHECKPOINT_HELP = "a folder in diffusers layout, a hub id, a variant, `sample`, or a single file with --config"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=CHECKPOINT_HELP)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder of the artifact")
    add_onnx_options(parser)


def add_onnx_options(onnx: argparse.ArgumentParser) -> None:
    """Add the options of `export onnx` other than the checkpoint and the output folder."""
    onnx.add_argument(
        "--parts", metavar="A,B", help=f"parts to export, of {', '.join(ALL_PARTS)}; default: all parts of the variant"
    )
    onnx.add_argument("--dtype", choices=get_args(Compute), default="fp32", help="compute type of the graphs")
    onnx.add_argument(
        "--attention",
        choices=("op", "matmul"),
        default="matmul",
        help="op: the ONNX Attention operator (TensorRT 10.14 and later); matmul: MatMul, Softmax and MatMul",
    )
    onnx.add_argument(
        "--config",
        metavar="CHECKPOINT",
        help="checkpoint from which a single file takes its sizes, tokenizer and other parts; default: none",
    )
    onnx.add_argument(
        "--transformer", metavar="FILE", help="single file that replaces the checkpoint's transformer; default: none"
    )
    onnx.add_argument("--vae", metavar="FILE", help="single file that replaces the checkpoint's VAE; default: none")
    onnx.add_argument(
        "--text-encoder",
        metavar="FILE",
        help="single file that replaces the checkpoint's text encoder; default: none",
    )
    onnx.add_argument(
        "--variant",
        metavar="NAME",
        help="variant of the files to read in a folder, such as bf16 for model.bf16.safetensors; default: files "
        "without one",
    )
    onnx.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[=WEIGHT]",
        help="adapter to merge into the transformer or the text encoder, with its weight (1 if omitted); can be "
        "repeated; default: none",
    )


def parse_parts(text: str) -> tuple[PartName, ...]:
    """Parse "a,b" into parts, in pipeline order; raises UsageError for an unknown part."""
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    for word in wanted:
        if word not in ALL_PARTS:
            raise UsageError(f"unknown part {word!r}; there are: {', '.join(ALL_PARTS)}")
    if not wanted:
        raise UsageError(f"--parts: no part is named; there are: {', '.join(ALL_PARTS)}")
    return tuple(part for part in ALL_PARTS if part in wanted)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the export and print its progress; returns the facts."""
    parts = None if args.parts is None else parse_parts(args.parts)
    from export.lora.terms import Lora
    from export.sources import find_sources

    check_out(args.out, ONNX, checkpoint_files(args))  # before anything is downloaded
    loras = tuple(Lora.parse(text) for text in args.lora)
    sources = find_sources(args.checkpoint, parts or PARTS, args.config, args.transformer, args.vae, args.text_encoder)
    from tqdm import tqdm

    from export.artifact import ExportConfig, PartReport, export  # imports torch: only for valid arguments
    from export.node_report import summary

    parts = parts or parts_of(read_variant(sources.checkpoint))
    config = ExportConfig(parts, args.dtype, args.attention, loras, sources.single_files, args.variant)
    with tqdm(total=len(parts), desc="export", unit="part", disable=not sys.stderr.isatty(), leave=False) as bar:

        def done(part: PartReport) -> None:
            weights = f"{part.linked_bytes / 1e6:.1f} MB of weights linked"
            if part.copied_bytes:
                weights += f", {part.copied_bytes / 1e6:.1f} MB copied (no hard links between these file systems)"
            if part.derived_bytes:
                weights += f", {part.derived_bytes / 1e6:.1f} MB computed and written"
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
    """Run an export with arguments that another command line has parsed; returns the exit code."""
    args.out = Path(args.out)
    return report(lambda: run(args), args.json)
