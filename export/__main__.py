"""Command line: python -m export onnx | lint | engine."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from export.engine.command import add_engine
from export.operators import VERSIONS, parse_versions
from kit.cli import report
from kit.errors import CheckFailed, UsageError
from kit.ports import ALL_PARTS, PARTS, Compute, PartName, parts_of
from kit.variants import Variant

CHECKPOINT_HELP = "a folder in diffusers layout, a hub id, a variant, `sample`, or a single file with --config"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns the exit code."""
    args = parser().parse_args(argv)
    return report(lambda: args.step(args), args.json)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(prog="python -m export", description="checkpoint -> ONNX, without loading a weight")
    commands = top.add_subparsers(dest="command", required=True)
    onnx = commands.add_parser("onnx", help="export a checkpoint to ONNX")
    onnx.add_argument("checkpoint", help=CHECKPOINT_HELP)
    onnx.add_argument("--out", type=Path, required=True, metavar="DIR", help="the artifact to write")
    add_onnx_options(onnx)
    onnx.set_defaults(step=_onnx)
    lint = commands.add_parser("lint", help="check every node of an artifact against TensorRT's operator table")
    lint.add_argument("artifact", type=Path, metavar="DIR")
    lint.add_argument(
        "--tensorrt",
        default=",".join(VERSIONS),
        metavar="VERSIONS",
        help="comma-separated; default: %(default)s",
    )
    lint.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    lint.set_defaults(step=_lint)
    add_engine(commands)
    return top


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
    onnx.add_argument("--json", action="store_true", help="print one JSON object on the last line")


def parse_parts(text: str) -> tuple[PartName, ...]:
    """Read "a,b" as parts, in the order of the pipeline; raises UsageError for an unknown one."""
    wanted = [word.strip() for word in text.split(",") if word.strip()]
    for word in wanted:
        if word not in ALL_PARTS:
            raise UsageError(f"unknown part {word!r}; there are: {', '.join(ALL_PARTS)}")
    if not wanted:
        raise UsageError(f"--parts names no part; there are: {', '.join(ALL_PARTS)}")
    return tuple(part for part in ALL_PARTS if part in wanted)


def _onnx(args: argparse.Namespace) -> dict[str, Any]:
    parts = None if args.parts is None else parse_parts(args.parts)
    from export.lora.terms import Lora
    from export.sources import find_sources

    loras = tuple(Lora.parse(text) for text in args.lora)
    sources = find_sources(args.checkpoint, parts or PARTS, args.config, args.transformer, args.vae)
    from tqdm import tqdm

    from export.artifact import ExportConfig, PartReport, export  # brings torch: only once the arguments make sense
    from export.node_report import summary

    parts = parts or parts_of(Variant.of(sources.checkpoint))
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


def run_onnx(args: argparse.Namespace) -> int:
    """Export with arguments that another command line has parsed; returns the exit code."""
    args.out = Path(args.out)
    return report(lambda: _onnx(args), args.json)


def _lint(args: argparse.Namespace) -> dict[str, Any]:
    from export.lint import lint

    findings, nodes = lint(args.artifact, parse_versions(args.tensorrt))
    for finding in findings:
        print(finding, file=sys.stderr)
    for part, count in nodes.items():
        mine = sum(finding.graph == part for finding in findings)
        print(f"{part:<19} {count:>5} nodes  {f'{mine} findings' if mine else 'accepted'}")
    if findings:
        raise CheckFailed(f"{args.artifact}: TensorRT would refuse {len(findings)} nodes; the lines above say which")
    return {"artifact": str(args.artifact), "nodes": nodes, "tensorrt": args.tensorrt.split(",")}


if __name__ == "__main__":
    sys.exit(main())
