"""Capacity of a deployment, and latency, throughput and cost at shares of it, under Poisson and closed-loop load.

Requests of every class are sent alone; closed loops of 1 to 8 clients give the capacity; then Poisson streams and 16
clients that think between requests load the server at shares of the capacity. Each image is compared with that of the
same request alone. The planner's queue serves the same arrivals, to compare its p95 with the measured one. A deployment
is also started with other policies of its denoiser, and gets the same arrivals: batching of steps, of whole requests,
and one at a time.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.compare import read
from benchmarks.machine import describe
from benchmarks.serving import points
from benchmarks.serving.capacity import Capacity, measure_alone, measure_capacity, measure_saturated
from benchmarks.serving.mix import read_mix
from benchmarks.serving.points import Target, Terms
from benchmarks.serving.policies import POLICIES, policy_names, with_policy
from benchmarks.serving.prediction import predict
from kit.errors import UsageError
from kit.gpus import gpu
from planner.prices import HostNeed, read_prices
from serve.client import Client
from serve.launch import Server

METRICS_PORT = 8002


def add_arguments(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--url", metavar="HOST:PORT", help="gRPC address of a running server; default: none")
    where.add_argument("--again", type=Path, metavar="FILE", help="a result: predict its loads again; default: none")
    where.add_argument(
        "--deployment", type=Path, metavar="DEPLOY", help="what `serve repository` wrote, to start; default: none"
    )
    parser.add_argument(
        "--metrics-url", metavar="HOST:PORT", help=f"metrics of the server at --url (default: its port {METRICS_PORT})"
    )
    parser.add_argument(
        "--mix", type=Path, metavar="FILE", help="classes of requests as JSON (default: short, long, large)"
    )
    parser.add_argument("--loads", default="0.3,0.6,0.8,0.95", metavar="SHARES", help="shares of the capacity")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="N", help="length of each Poisson load")
    parser.add_argument("--closed-seconds", type=float, default=8.0, metavar="N", help="length of each closed loop")
    parser.add_argument("--lone", type=int, default=16, metavar="N", help="requests of each class that are sent alone")
    parser.add_argument(
        "--policies", default=",".join(POLICIES), metavar="NAMES", help="of the denoiser, with --deployment"
    )
    parser.add_argument("--policy-load", type=float, default=0.8, metavar="SHARE", help="load of the policies beside")
    parser.add_argument("--deadlines", default="2,3", metavar="TIMES", help="of goodput, in times of a lone request")
    parser.add_argument("--price", type=float, metavar="USD", help="of an hour of the machine; default: no costs")
    parser.add_argument("--gpu", metavar="NAME", help="take the planner's price of an hour of this GPU; default: none")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; raises UsageError for wrong use, and CheckFailed if a request fails without load."""
    if args.again is not None:
        return _predicted(read(args.again))
    classes, names, price = read_mix(args.mix), policy_names(args.policies), hourly_price(args.price, args.gpu)
    deadlines, shares = numbers(args.deadlines, "--deadlines"), numbers(args.loads, "--loads")
    facts: dict[str, Any] = {
        "machine": describe(),
        "load_average_before": round(os.getloadavg()[0], 1),
        "mix": {one.name: {"share": one.share, "fields": _shown(one.fields)} for one in classes},
        "dollars_per_hour": price,
    }

    def measure(target: Target) -> Measured:
        with Client(target.url) as client:
            say("requests alone")
            terms = Terms(classes, measure_alone(client, classes, args.lone, target.metrics), deadlines, price)
            say("capacity")
            capacity = measure_capacity(client, classes, terms.alone, args.closed_seconds, target.metrics)
        return Measured(terms, capacity)

    if args.url is not None:
        host = args.url.rpartition(":")[0] or "localhost"
        target = Target(args.url, args.metrics_url or f"{host}:{METRICS_PORT}")
        known = measure(target)
        return _predicted(facts | known.facts() | {"loads": _loads(target, known, shares, args)})
    facts["policies"] = {}
    measured: Measured | None = None
    deployment = args.deployment.resolve()
    with tempfile.TemporaryDirectory(prefix=".benchmark-", dir=deployment.parent) as folder:
        for name in names:
            say(f"policy {name}: starting the server")
            made = with_policy(deployment, POLICIES[name], Path(folder))
            with Server(made, log=Path(os.devnull)) as server:
                target = Target(server.url, f"{server.ports.host}:{server.ports.metrics}")
                if measured is None:
                    measured = measure(target)
                    facts |= measured.facts() | {"loads": _loads(target, measured, shares, args)}
                known = facts["loads"] if name == names[0] else []
                facts["policies"][name] = _policy(target, measured, args, known)
    return _predicted(facts)


@dataclass(frozen=True)
class Measured:
    """What is known of a server before it is loaded."""

    terms: Terms
    capacity: Capacity

    def facts(self) -> dict[str, Any]:
        alone, capacity = self.terms.alone, self.capacity
        return {
            "alone_stages_seconds": alone.stages,
            "alone_seconds": {name: [round(s, 4) for s in seconds] for name, seconds in alone.seconds.items()},
            "capacity": {
                "images_per_second": round(capacity.per_second * self.terms.images_per_request, 3),
                "requests_per_second": round(capacity.per_second, 3),
                "gains_by_requests_in_flight": [round(gain, 3) for gain in capacity.gains],
                "step_seconds": capacity.step,
                "requests_per_call": capacity.per_call,
            },
        }


def _predicted(facts: dict[str, Any]) -> dict[str, Any]:
    """Add the planner's prediction to every Poisson load."""
    for row in facts["loads"]:
        if "samples" in row:
            row["planner"] = predict(facts, row["samples"])
    return facts


def _loads(target: Target, measured: Measured, shares: list[float], args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for share in shares:
        rate = share * measured.capacity.per_second
        say(f"load {share:g}: Poisson, {rate:.2f} requests a second")
        found.append({"load": share, **points.poisson(target, measured.terms, rate, args.seconds)})
        if args.closed_seconds:
            say(f"load {share:g}: {points.CLIENTS} clients")
            found.append({"load": share, **points.closed(target, measured.terms, rate, args.closed_seconds)})
    return found


def _policy(
    target: Target, measured: Measured, args: argparse.Namespace, known: list[dict[str, Any]]
) -> dict[str, Any]:
    """Measure one policy at a share of the first policy's capacity; `known` are loads that were measured with it."""
    row = next((row for row in known if row["load"] == args.policy_load and "samples" in row), None)
    if row is not None:
        return {"saturated_per_second": round(measured.capacity.saturated, 3), **row}
    classes = measured.terms.classes
    with Client(target.url) as client:
        measure_alone(client, classes, 0, target.metrics)
        saturated = measure_saturated(client, classes, args.closed_seconds)
    rate = args.policy_load * measured.capacity.per_second
    facts = points.poisson(target, measured.terms, rate, args.seconds)
    return {"saturated_per_second": round(saturated, 3), "load": args.policy_load, **facts}


def table(facts: dict[str, Any]) -> str:
    """Format the measurements as lines of text."""
    capacity, names = facts["capacity"], list(facts["mix"])
    lines = [
        f"alone, median: {', '.join(f'{n} {_middle(s):.3f} s' for n, s in facts['alone_seconds'].items())}",
        f"capacity: {capacity['requests_per_second']:.2f} requests a second; throughput with 1, 2, ... in flight: "
        + ", ".join(f"{gain:.2f}" for gain in capacity["gains_by_requests_in_flight"]),
        "",
        f"{'load':>5} {'arrivals':>10} {'images/min':>10} "
        + " ".join(f"{name + ' p50 p95 p99, s':>24}" for name in names),
    ]
    for row in facts["loads"]:
        lines.append(f"{row['load']:5g} {_columns(row, names)}")
        if "planner" in row:
            told = row["planner"]
            lines.append(
                f"{'':5} {'planner':>10} {'p95':>10} "
                + " ".join(f"{_told(told['classes'][name]):>24}" for name in names)
                + f"   all: {_told(told['all'])}"
            )
        server = row["server"]
        lines.append(
            f"{'':16} rows a call {server['rows_per_call']:.2f}; a request: "
            + ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in server["stages_seconds"].items())
        )
        goodput = ", ".join(f"{n} times alone {v:g}" for n, v in row["goodput_per_minute"].items())
        cost = row["dollars_per_1000_images"]
        lines.append(
            f"{'':16} goodput within {goodput}; {row['images_that_differ']} images differ; errors: "
            f"{row['errors'] or 'none'}" + ("" if cost is None else f"; ${cost:.2f} per 1,000 images")
        )
    for name, row in facts.get("policies", {}).items():
        lines += ["", f"policy {name}: {row['saturated_per_second']:.2f} requests a second with 8 in flight"]
        lines.append(f"{row['load']:5g} {_columns(row, names)}")
    return "\n".join(lines)


def _columns(row: dict[str, Any], names: list[str]) -> str:
    cells = [
        " ".join("-" if row["classes"][n][p] is None else f"{row['classes'][n][p]:.3f}" for p in ("p50", "p95", "p99"))
        for n in names
    ]
    return f"{row['arrivals']:>10} {row['images_per_minute']:10.1f} " + " ".join(f"{cell:>24}" for cell in cells)


def _told(row: dict[str, Any]) -> str:
    return "-" if row["error"] is None else f"{row['predicted_p95']:.3f} ({row['error']:+.0%})"


def _middle(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _shown(fields: Any) -> dict[str, Any]:
    return {name: f"{len(value)} bytes" if isinstance(value, bytes) else value for name, value in fields.items()}


def say(text: str) -> None:
    """Tell what is being done, where the result does not go."""
    print(text, file=sys.stderr, flush=True)


def numbers(text: str, option: str) -> list[float]:
    """Parse positive numbers separated by commas; raises UsageError."""
    try:
        found = [float(word) for word in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < math.inf for value in found):
        raise UsageError(f"{option} {text}: expected positive numbers separated by commas")
    return found


def hourly_price(price: float | None, card: str | None) -> float | None:
    """Return the dollars of an hour: as given, or of the planner's offer for a GPU; raises UsageError."""
    if price is not None or card is None:
        return price
    usable = read_prices().usable(gpu(card).name, HostNeed(0))
    if usable is None:
        raise UsageError(f"--gpu {card}: the planner has no price of it; give --price")
    return usable.used.usd_per_hour
