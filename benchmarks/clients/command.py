"""Other people's load generators on a deployment: NVIDIA's perf_analyzer and AIPerf, and locust, beside our own client.

Each keeps so many requests in flight, as our own client does before and after it in the same run; the ratios of
throughput and median latency tell whether ours measures what others measure. They are taken from the package index into
a folder of their own. What they write is kept.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.clients.runs import TOOLS, Job, Result
from benchmarks.machine import describe
from benchmarks.serving.command import say
from benchmarks.serving.loads import Outcome, closed_loop, percentile, rate, send
from benchmarks.serving.mix import PROMPT
from kit.errors import CheckFailed, UsageError
from serve.client import Client
from serve.launch import Server

FIELDS = {"prompt": PROMPT, "steps": 4, "width": 128, "height": 128, "seed": 1}
ALIKE = 0.10  # by which throughput and latency of two clients may differ


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("deployment", type=Path, metavar="DEPLOY", help="what `serve repository` wrote; it is started")
    parser.add_argument(
        "--tool", default=",".join(TOOLS), metavar="NAMES", help="which run, one after the other, separated by commas"
    )
    parser.add_argument("--concurrency", type=int, default=4, metavar="N", help="requests in flight")
    parser.add_argument("--requests", type=int, default=90, metavar="N", help="requests of each tool")
    parser.add_argument("--into", type=Path, required=True, metavar="DIR", help="new folder for what the tools write")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/flux2-deploy/clients"),
        metavar="DIR",
        help="folder where the tools are kept",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the tools; one that cannot be had or fails has its reason in the result, and the others go on."""
    names = [name for name in args.tool.split(",") if name]
    if unknown := [name for name in names if name not in TOOLS]:
        raise UsageError(f"--tool {unknown[0]}: there are: {', '.join(TOOLS)}")
    if args.requests < 3 or args.concurrency < 1:
        raise UsageError("--requests must be at least 3, --concurrency at least 1")
    if args.into.exists():
        raise UsageError(f"--into {args.into} exists; name a new folder")
    cache = args.cache.expanduser().resolve()
    facts: dict[str, Any] = {
        "machine": describe(),
        "load_average_before": round(os.getloadavg()[0], 1),
        "request": FIELDS,
        "concurrency": args.concurrency,
        "tools": {},
    }
    with Server(args.deployment, log=Path(os.devnull)) as server, Client(server.url) as client:
        http = f"{server.ports.host}:{server.ports.http}"
        for _ in range(10):
            send(client, FIELDS)
        before = _own(client, args)
        for name in names:
            say(f"{name}: {args.requests} requests, {args.concurrency} in flight")
            into = (args.into / name).resolve()
            into.mkdir(parents=True)
            tokenizer = args.deployment.resolve() / "tokenizer" / "1" / "tokenizer"
            job = Job(
                server.url, http, FIELDS, args.concurrency, args.requests, args.requests / rate(before), tokenizer, into
            )
            try:
                found = TOOLS[name](job, cache)
            except CheckFailed as error:
                facts["tools"][name] = {"failed": str(error)}
                continue
            after = _own(client, args)
            facts["tools"][name] = compare(found, [before, after])
            before = after
    return facts


def _own(client: Client, args: argparse.Namespace) -> list[Outcome]:
    """Send as many requests with the kit's own client, over gRPC."""
    outcomes = closed_loop(client, args.concurrency, float("inf"), lambda n: FIELDS, count=args.requests)
    if failed := next((outcome for outcome in outcomes if outcome.image is None), None):
        raise CheckFailed(f"a request of the kit's own client failed: {failed.error}")
    return outcomes


def compare(found: Result, own: Sequence[Sequence[Outcome]]) -> dict[str, Any]:
    """Return what a tool measured beside the kit's own client, which ran before and after it."""
    ours = [outcome.seconds for outcomes in own for outcome in outcomes]
    throughput, p50 = fmean(rate(outcomes) for outcomes in own), median(ours)
    ratios = {"throughput": round(found.per_second / throughput, 3), "p50": round(found.p50 / p50, 3)}
    return {
        **{name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(found).items()},
        "own": {"per_second": [round(rate(o), 4) for o in own], "p50": round(p50, 4), "p95": percentile(ours, 95)},
        "ratio_to_own": ratios,
        "agrees": all(abs(ratio - 1) <= ALIKE for ratio in ratios.values()),
    }


def table(facts: dict[str, Any]) -> str:
    """Format the measurements as lines of text."""
    lines = [f"{facts['concurrency']} requests in flight; own: the kit's client over gRPC, before and after each tool"]
    lines.append(f"{'':20} {'per second':>10} {'p50, s':>8} {'p95, s':>8} {'errors':>6}   of own: throughput, p50")
    for name, row in facts["tools"].items():
        if "failed" in row:
            lines.append(f"{name:20} {row['failed']}")
            continue
        ratios = row["ratio_to_own"]
        lines.append(
            f"{name:20} {row['per_second']:10.2f} {row['p50']:8.3f} {row['p95']:8.3f} {row['errors']:6} "
            f"{ratios['throughput']:14.2f}, {ratios['p50']:.2f}{'' if row['agrees'] else '  differs by more than 10 %'}"
        )
    return "\n".join(lines)
