"""Measure the cost of quantizing: seconds, throughput relative to `cp` of the same file, and peak memory.

The transformer of a published variant at full size with random weights is quantized tensor by tensor. Each measurement
runs in its own process, reads a file that was dropped from the page cache, and ends when its output is on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import random_weights, residency
from benchmarks.machine import describe
from kit.errors import UsageError
from kit.variants import Variant

RECIPES = ("fp8", "int8", "int8-weights", "int4-weights")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", default="klein-4b", metavar="NAME", help="variant whose transformer is quantized")
    parser.add_argument("--recipes", default=",".join(RECIPES), metavar="A,B", help="recipes to measure")
    parser.add_argument(
        "--rounds", type=int, metavar="N", default=3, help="rounds of cp and each recipe; medians are reported"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/quantize-cost"),
        metavar="DIR",
        help="work folder; needs 20 GB of disk for klein-4b",
    )
    parser.add_argument("--double-blocks", type=int, metavar="N", help="for a trial run; default: all double blocks")
    parser.add_argument("--single-blocks", type=int, metavar="N", help="for a trial run; default: all single blocks")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the measurements; returns medians and the rounds they come from."""
    recipes = args.recipes.split(",")
    variant = Variant.named(args.variant)
    sizes = variant.transformer
    sizes = replace(
        sizes,
        double_blocks=args.double_blocks or sizes.double_blocks,
        single_blocks=args.single_blocks or sizes.single_blocks,
    )
    variant = replace(variant, transformer=sizes)
    free = shutil.disk_usage(args.work.parent if args.work.parent.exists() else Path()).free
    if free < 25e9 and args.double_blocks is None:
        raise UsageError(f"--work {args.work}: {free / 1e9:.0f} GB free, 25 GB needed")
    checkpoint = random_weights.write(variant, args.work / "checkpoint")
    artifact = args.work / "onnx"
    _command("export", "onnx", str(checkpoint), "--out", str(artifact), "--parts", "transformer", "--dtype", "bf16")
    record = args.work / "calibration.json"
    _synthetic_record(artifact, record)
    (source,) = sorted((artifact / "transformer").glob("*.safetensors"))
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ("cp", *recipes)}
    for _ in range(args.rounds):
        rounds["cp"].append(_copy(source, args.work / "copy.safetensors"))
        for recipe in recipes:
            rounds[recipe].append(_quantize(artifact, args.work / recipe, recipe, record, source))
            shutil.rmtree(args.work / recipe)
    facts: dict[str, Any] = {
        "source_bytes": source.stat().st_size,
        "rounds": rounds,
        "median": {},
        "machine": describe(),
    }
    ratios = {
        recipe: [
            b["seconds"] and a["seconds"] / b["seconds"] for a, b in zip(rounds["cp"], rounds[recipe], strict=True)
        ]
        for recipe in recipes
    }
    for name, found in rounds.items():
        seconds = _median([one["seconds"] for one in found])
        facts["median"][name] = {
            "seconds": round(seconds, 2),
            "source_mb_per_s": round(source.stat().st_size / seconds / 1e6),
            "of_cp": 1.0 if name == "cp" else round(_median(ratios[name]), 3),
            "peak_rss_gb": round(max(one.get("peak_rss_bytes", 0.0) for one in found) / 1e9, 3),
        }
    return facts


def table(facts: dict[str, Any]) -> str:
    """Format the medians as a table."""
    lines = [f"{'':<14} {'seconds':>8} {'MB/s':>6} {'of cp':>6} {'peak GB':>8}"]
    lines += [
        f"{name:<14} {row['seconds']:>8.1f} {row['source_mb_per_s']:>6} {row['of_cp']:>6.2f} {row['peak_rss_gb']:>8.2f}"
        for name, row in facts["median"].items()
    ]
    return "\n".join(lines)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _command(*words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", *words, "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UsageError(f"python -m {' '.join(words)}: {done.stderr.strip().splitlines()[-1]}")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def _copy(source: Path, target: Path) -> dict[str, float]:
    os.sync()
    residency.drop(source)
    begin = time.perf_counter()
    subprocess.run(["cp", str(source), str(target)], check=True)
    _flush(target)
    seconds = time.perf_counter() - begin
    target.unlink()
    return {"seconds": seconds}


def _quantize(artifact: Path, out: Path, recipe: str, record: Path, source: Path) -> dict[str, float]:
    os.sync()
    residency.drop(source)
    facts = _command(
        "quantize", "apply", str(artifact), "--recipe", recipe, "--calibration", str(record), "--out", str(out)
    )
    begin = time.perf_counter()
    _flush(out / "transformer" / "quantized.safetensors")
    flush = time.perf_counter() - begin
    # only the part, from the planned layers to the written graph: cp does not plan a graph or start Python
    (part,) = facts["parts"]
    return {
        "seconds": part["seconds"] + flush,
        "whole_command_seconds": facts["seconds"] + flush,
        "peak_rss_bytes": facts["peak_rss_bytes"],
    }


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def _synthetic_record(artifact: Path, out: Path) -> None:
    """Write a record in which every layer saw normal numbers with a few strong channels, which is enough for timing."""
    import numpy as np
    import onnx_ir as ir

    from kit.artifact import read_manifest
    from quantize.calibration import record
    from quantize.linears import find_linears

    manifest = read_manifest(artifact)
    model = ir.load(artifact / manifest.part("transformer").graph)
    rng = np.random.default_rng(0)
    layers = {}
    for linear in find_linears(model, artifact / "transformer"):
        amax = (4 * np.exp(rng.standard_normal(linear.inputs) * 0.5)).astype(np.float32)
        square = (amax / 4) ** 2
        layers[linear.name] = record.Seen(
            1, float(amax.max()), (), {}, amax, square.astype(np.float32), record.fingerprint(linear.weight)
        )
    run = {"prompts": {"spec": "synthetic", "digest": "", "count": 0}, "seeds": [], "steps": 0}
    record.write(record.Record(manifest.variant.name, (run,), {"transformer": layers}), out)
