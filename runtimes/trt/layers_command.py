"""The command `export layers`: what the compiler made of a graph, block by block or kernel by kernel."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kit.artifact import MANIFEST, read_manifest
from kit.errors import UsageError
from kit.gpus import GPUS, Gpu, gpu
from runtimes.trt.layer_table import SUFFIX, Block, Layer, by_block, kernels, read
from runtimes.trt.record import EngineRecord


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("engine", type=Path, metavar="PLAN|DIR", help="an engine artifact, or one plan of it")
    parser.add_argument("--gpu", metavar="NAME", help=f"roofline for this GPU: {', '.join(GPUS)}; default: the plan's")
    parser.add_argument("--kernels", action="store_true", help="list every kernel in place of a line per block")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the tables; returns them per plan."""
    folder = args.engine if args.engine.is_dir() else args.engine.parent.parent
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{args.engine}: neither an engine artifact nor a plan of one; `export engine` writes them")
    manifest = read_manifest(folder)
    if manifest.kind != "engine":
        raise UsageError(f"{folder} is an artifact of kind {manifest.kind!r}; expected engine")
    record = EngineRecord.of(manifest)
    card = gpu(args.gpu or record.gpu)
    wanted = [plan for plans in record.plans.values() for plan in plans]
    if not args.engine.is_dir():
        wanted = [plan for plan in wanted if (folder / plan.file).resolve() == args.engine.resolve()]
        if not wanted:
            raise UsageError(f"{args.engine}: not a plan of {folder}")
    told: dict[str, Any] = {}
    for plan in wanted:
        layers = read((folder / plan.file).with_suffix(SUFFIX))
        sizes = ", ".join(f"{axis} {size}" for axis, size in plan.layers.get("sizes", {}).items())
        print(f"{plan.file}{f' at {sizes}' if sizes else ''}, roofline on {card.title}")
        lines = _kernel_lines(layers, card) if args.kernels else _block_lines(layers, card)
        print("\n".join(lines))
        told[plan.file] = {name: asdict(block) for name, block in by_block(layers, card).items()}
    return {"engine": str(args.engine), "gpu": card.name, "plans": told}


def _block_lines(layers: tuple[Layer, ...], card: Gpu) -> list[str]:
    lines = [f"{'block':<34}{'kernels':>8}{'MB':>10}{'ms':>10}  products, attention"]
    blocks = by_block(layers, card)
    for name, block in sorted(blocks.items(), key=lambda item: _order(item[0])):
        words = [f"{count} {kind}" for kind, count in block.products.items()] + [
            f"attention {a}" for a in block.attention
        ]
        lines.append(f"{name or 'outside of blocks':<34}{_numbers(block)}  {', '.join(words)}")
    whole = Block(
        kernels=sum(b.kernels for b in blocks.values()),
        bytes=sum(b.bytes for b in blocks.values()),
        seconds=sum(b.seconds for b in blocks.values()),
        products={},
        attention=(),
    )
    return [*lines, f"{'all':<34}{_numbers(whole)}"]


def _numbers(block: Block) -> str:
    return f"{block.kernels:>8}{_scaled(block.bytes, 1e-6):>10}{_scaled(block.seconds, 1e3):>10}"


def _scaled(value: float, factor: float) -> str:
    return "dynamic" if math.isnan(value) else f"{value * factor:.4g}"


def _order(name: str) -> tuple[str, int]:
    kind, _, number = name.rpartition(".")
    return kind, int(number) if number.isdigit() else 0


def _kernel_lines(layers: tuple[Layer, ...], card: Gpu) -> list[str]:
    lines = [f"{'ms':>10}{'MB':>10}  {'reads > writes':<16}{'kind':<16}nodes"]
    for layer in kernels(layers):
        types = f"{layer.reads} > {layer.writes}"
        kind = "attention" if layer.is_attention else "product" if layer.is_product else layer.kind
        nodes = ", ".join(layer.nodes[:3]) + (f", ... ({len(layer.nodes)})" if len(layer.nodes) > 3 else "")
        numbers = f"{_scaled(layer.seconds(card), 1e3):>10}{_scaled(layer.moved(), 1e-6):>10}"
        lines.append(f"{numbers}  {types:<16}{kind:<16}{nodes or layer.name}")
    return lines
