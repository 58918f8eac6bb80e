"""Benchmark FLUX.2 at full size on a GPU with random weights, in every mode, relative to the ceilings of the card.

    python -m benchmarks gpu                      # what is not measured yet, at most 9 minutes; run again to continue
    python -m benchmarks gpu --only 'part/transformer/*/1024x1024/b1'
    python -m benchmarks gpu --device cpu --size tiny --backend eager --into dry.json      # a dry run anywhere

It needs these sources, torch, transformers and triton, but no network. diffusers (whose modules ours use) and torchao
(needed by some modes) can be installed from wheels; on a machine with a network, for Python 3.12 on the GPU machine:

    pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp --platform
        manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 -d wheels diffusers==0.42.1 torchao==0.18.0
        importlib_metadata
    pip install --no-index --no-deps --target site wheels/*.whl && export PYTHONPATH=site:.      # on the GPU machine

Each group of cases runs in a separate process. A mode that fails or runs out of memory becomes a row with its reason.
Failed rows are tried again by the next run, measured ones only with --again.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from benchmarks import machine
from benchmarks.gpu import results, runner
from benchmarks.gpu.cases import Grid, RunSettings, Size, cases, chosen
from benchmarks.gpu.points import points
from benchmarks.gpu.table import render
from kit.errors import UsageError
from kit.variants import VARIANTS

INTO = Path("build/gpu.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = RunSettings()
    parser.add_argument("--variant", default=default.variant, metavar="NAME", help="variant whose sizes are measured")
    parser.add_argument("--device", default=default.device, metavar="DEVICE", help="device of torch")
    parser.add_argument(
        "--size", choices=get_args(Size), default=default.size, help="tiny: a dry run that takes seconds"
    )
    parser.add_argument("--grid", choices=get_args(Grid), default="short", help="full: every shape in every mode")
    parser.add_argument("--only", metavar="PATTERN,...", help="cases by id, with * and ?; default: all")
    parser.add_argument("--list", action="store_true", help="print the ids of the cases and measure nothing")
    parser.add_argument("--again", action="store_true", help="repeat cases that are already measured")
    parser.add_argument(
        "--into", type=Path, default=INTO, metavar="FILE", help="results, merged with those of earlier runs"
    )
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS", help="time limit of this run")
    parser.add_argument("--case-seconds", type=float, default=240.0, metavar="SECONDS", help="time limit per case")
    parser.add_argument(
        "--seconds", type=float, default=default.seconds, metavar="S", help="duration of timed runs per case"
    )
    parser.add_argument(
        "--requests", type=int, default=default.requests, metavar="N", help="number of requests in the batching cases"
    )
    parser.add_argument(
        "--backend", default=default.backend, metavar="NAME", help="torch.compile backend; `eager` compiles nothing"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the remaining cases; returns everything measured so far."""
    for name in ("budget", "case_seconds", "seconds", "requests"):
        if getattr(args, name) <= 0:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(args, name):g}: must be positive")
    if args.variant not in VARIANTS or VARIANTS[args.variant].guidance != "none":
        distilled = ", ".join(v.name for v in VARIANTS.values() if v.guidance == "none")
        raise UsageError(f"--variant {args.variant}: whole images need a step-distilled variant: {distilled}")
    wanted = chosen(cases(args.size, args.grid), args.only)
    if args.list:
        return {"benchmark": "gpu", "cases": [case.id for case in wanted]}
    settings = RunSettings(
        variant=args.variant,
        device=args.device,
        size=args.size,
        launch="graphs" if args.device.startswith("cuda") else "calls",
        backend=args.backend,
        seconds=args.seconds,
        steps=VARIANTS[args.variant].steps,
        requests=args.requests,
    )
    facts = results.read(args.into)
    results.check_same(facts, "settings", asdict(settings))  # checked early; the device is only known later
    known = set() if args.again else results.finished(facts)
    left = [case for case in wanted if case.id not in known]
    date = datetime.datetime.now(datetime.UTC).date().isoformat()

    def done(found: runner.Found, row: dict[str, Any]) -> None:
        results.merge(facts, found.device, asdict(settings), [row], date)
        results.add_shares(facts)
        facts["machine"] = machine.describe()
        facts["planner"] = points(facts)
        results.write(args.into, facts)
        number = f"{row['median'] * 1000:.2f} ms" if "median" in row else f"{row['state']}: {row['reason']}"
        print(f"{row['id']:<56} {number}", file=sys.stderr, flush=True)

    runner.measure(left, settings, time.time() + args.budget, args.case_seconds, done)
    measured = {row["id"] for row in facts["rows"]}
    facts["left"] = [case.id for case in wanted if case.id not in measured]
    return facts


def table(facts: dict[str, Any]) -> str:
    """Render the rows as text."""
    return "\n".join(facts["cases"]) if "cases" in facts else render(facts)
