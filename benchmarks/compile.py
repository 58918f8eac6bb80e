"""What TensorRT for RTX makes of the published sizes, on a machine without a GPU: time, memory, plans, kernels, bytes.

Each row is one `export engine` in a process of its own. With `--weights inputs` the compiler sees no weights, so the
checkpoints are sparse files. With weights in the plans they are random, because the compiler merges equal tensors; such
rows are made for klein-4b. Times of kernels are rooflines: bytes at the GPU's bandwidth or operations at its rate,
whichever takes longer; nothing is run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import random_weights, sparse
from benchmarks.machine import describe
from benchmarks.measure import measure
from kit.errors import UsageError
from kit.recipes import RECIPES
from kit.variants import VARIANTS


@dataclass(frozen=True)
class Case:
    """One engine to build."""

    variant: str
    recipe: str
    gpu: str
    weights: str = "inputs"
    parts: str = ""  # all


ALL_RECIPES = {**RECIPES, "fp8-attention": replace(RECIPES["fp8"], name="fp8-attention", attention="fp8")}
CASES = (
    Case("klein-4b", "fp8", "l4"),
    Case("klein-4b", "fp8-attention", "l4"),
    Case("klein-4b", "int8", "a10g"),
    Case("klein-4b", "bf16", "l4"),
    Case("klein-9b", "fp8", "l4"),
    Case("klein-9b", "int8", "a10g"),
    Case("dev", "fp8", "l40s"),
    Case("dev", "fp8", "l4"),
    Case("dev", "bf16", "rtx5090", parts="transformer"),
    Case("klein-4b", "fp8", "l4", "plan"),
    Case("klein-4b", "int8", "a10g", "plan"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work",
        type=Path,
        metavar="DIR",
        default=Path("build"),
        help="where a work folder is made; needs 45 GB of disk",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="WORDS",
        help="build only rows with these words, for example 'klein-4b fp8'; default: all rows",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Build every engine; returns a row for each."""
    chosen = [case for case in CASES if set(args.only.split()) <= {case.variant, case.recipe, case.gpu, case.weights}]
    if not chosen:
        words = sorted({word for case in CASES for word in (case.variant, case.recipe, case.gpu, case.weights)})
        raise UsageError(f"--only {args.only!r} matches no row; there are words: {', '.join(words)}")
    rows = []
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="compile-", dir=args.work) as scratch:  # nothing else there is touched
        for case in chosen:
            rows.append(_row(case, Path(scratch)))
            print(_line(rows[-1]), file=sys.stderr, flush=True)
    return {"machine": describe(), "rows": rows}


def table(facts: dict[str, Any]) -> str:
    """Format the rows as lines of text."""
    head = f"{'engine':<34} {'s':>6} {'MB peak':>8} {'MB plans':>9}  transformer by the compiler's table"
    return "\n".join([head, *(_line(row) for row in facts["rows"])])


def _row(case: Case, work: Path) -> dict[str, Any]:
    artifact = _artifact(case, work)
    out = work / "engine"
    command = [sys.executable, "-m", "export", "engine", str(artifact), "--gpu", case.gpu, "--out", str(out)]
    command += ["--compiler", "tensorrt-rtx", "--weights", case.weights, "--json"]
    command += ["--parts", case.parts] if case.parts else []
    what = {"variant": case.variant, "recipe": case.recipe, "gpu": case.gpu, "weights": case.weights}
    check = subprocess.run([*command, "--check"], capture_output=True, text=True, check=False)
    if check.returncode:
        return {**what, "refused": check.stderr.strip().splitlines()[-1]}
    made = measure(command)
    facts = json.loads(made.stdout.splitlines()[-1])
    plans = {part: plans[0] for part, plans in facts["plans"].items()}
    shutil.rmtree(out)
    machine = describe()
    return {
        **what,
        "cpu": machine["cpu"],
        "date": machine["date"],
        "seconds": round(made.seconds, 1),
        "cpu_seconds": round(made.cpu_seconds, 1),
        "peak_rss_bytes": made.peak_rss_bytes,
        "plan_bytes": sum(plan["bytes"] for plan in plans.values()),
        "profiles": {part: len(plan["profiles"]) for part, plan in plans.items()},
        "compiler": f"{facts['compiler']} {facts['tensorrt']}",
        "parts": {part: plan["layers"] for part, plan in plans.items()},
    }


def _artifact(case: Case, work: Path) -> Path:
    """Return the artifact of a case: of sparse files, or of random weights where they go into the plans."""
    from benchmarks.sparse_quantized import quantize, synthetic_record
    from export.artifact import ExportConfig, export
    from quantize.apply.apply import apply

    kind = "random" if case.weights == "plan" else "sparse"
    folder = work / f"{case.variant}-{kind}"
    if not folder.is_dir():
        for other in work.iterdir():
            shutil.rmtree(other)  # one set of files at a time
        write = random_weights.write if kind == "random" else sparse.write
        write(VARIANTS[case.variant], folder / "checkpoint")
        export(folder / "checkpoint", folder / "bf16", ExportConfig(dtype="bf16"))
    out = folder / case.recipe
    if not out.is_dir() and kind == "sparse":
        quantize(folder / "bf16", out, ALL_RECIPES[case.recipe])
    elif not out.is_dir():
        apply(folder / "bf16", out, ALL_RECIPES[case.recipe], synthetic_record(folder / "bf16"))
    return out


def _line(row: dict[str, Any]) -> str:
    name = f"{row['variant']} {row['recipe']} {row['gpu']}, weights {row['weights']}"
    if "refused" in row:
        return f"{name:<34} refused: {row['refused']}"
    return (
        f"{name:<34} {row['seconds']:>6.1f} {row['peak_rss_bytes'] / 1e6:>8.0f} {row['plan_bytes'] / 1e6:>9.1f}  "
        + "; ".join(_blocks(row["parts"]["transformer"]))
    )


def _blocks(layers: dict[str, Any]) -> Iterator[str]:
    """Describe a step and each kind of block."""
    roofline = layers["roofline"]
    yield f"{1e3 * roofline['seconds']:.1f} ms a step"
    for kind, block in roofline["blocks"].items():
        yield f"{kind}: {block['kernels']} kernels, {block['bytes'] / 1e6:.0f} MB, {1e3 * block['seconds']:.2f} ms"
