"""What a deployment does when things go wrong: killed processes, overload, clients that leave, a soak with all of them.

Runs a deployment on the real tritonserver and sends it plain gRPC requests. `kills` ends each process of the server in
turn while ten requests are in flight; `cancels` abandons requests in four ways and times a request right afterwards;
`overload` sends ten times the capacity; `mixed` sends short and long requests at 80 % of it; `throughput` compares with
the same pipeline in one process, without a server, and with diffusers; `soak` mixes sizes, steps, cancellations and
kills, sends again what a kill lost, and compares each image with its serial twin; `malformed` sends requests that no
sane client sends beside a neighbour that is timed.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import malformed
from benchmarks.diffusers_rate import DiffusersRate
from benchmarks.machine import describe
from benchmarks.serving.loads import Outcome, open_loop, percentile, poisson_times, send
from kit.errors import UsageError
from serve.client import Client, fields_to_inputs
from serve.launch import Server
from serve.processes import stubs
from serve.settings import Settings
from serve.wire import DENOISER

PROMPT = "a red circle left of a blue square on a white background"
SHORT: dict[str, Any] = {"prompt": PROMPT, "steps": 4, "width": 128, "height": 128}
LONG: dict[str, Any] = {**SHORT, "steps": 28}
HUGE: dict[str, Any] = {**SHORT, "steps": 100, "width": 256, "height": 256}
SERVERS = ("tritonserver",)
LOST = re.compile("try again|send it again|no FLUX.2 server responds")  # errors after which a client sends it again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("deployment", type=Path, metavar="DEPLOY", help="what `serve repository` wrote")
    parser.add_argument(
        "--beside",
        type=Path,
        metavar="DEPLOY",
        help="`mixed`: a deployment of the same artifact with --policy first-come to compare with; default: none",
    )
    parser.add_argument(
        "--only", default="", metavar="NAMES", help=f"comma-separated parts, of {', '.join(PARTS)}; default: all"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="for `throughput`: the deployed klein checkpoint, run in diffusers; default: not compared",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="kills of each process and signal")
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="SECONDS", help="duration of `overload` and `mixed`"
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=0.0,
        metavar="N",
        help="`mixed`: requests per second; 0: 80 %% of the measured throughput",
    )
    parser.add_argument("--requests", type=int, default=2000, metavar="N", help="requests of `soak` and `malformed`")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen parts, each on a server of its own; returns the measurements of each."""
    names = [name for name in args.only.split(",") if name] or list(PARTS)
    if unknown := [name for name in names if name not in PARTS]:
        raise UsageError(f"--only {unknown[0]}: there are: {', '.join(PARTS)}")
    found: dict[str, Any] = {"machine": describe(), "load_average_before": round(os.getloadavg()[0], 1)}
    found["cache_bytes"] = Settings.read(args.deployment / DENOISER / "1").tuning.cache_bytes  # prompts repeat here
    for name in names:
        events: list[str] = []
        for suffix, deployment in (("", args.deployment), (" first-come", args.beside if name == "mixed" else None)):
            if deployment is None:
                continue
            with Server(deployment, log=Path(os.devnull), on_event=events.append) as server:
                found[name + suffix] = PARTS[name](server, args)
                found[name + suffix]["start_seconds"] = round(server.start_seconds, 1)
    return found


def table(facts: dict[str, Any]) -> str:
    """Format the measurements as lines of text."""
    lines = []
    for name in facts:
        if name.removesuffix(" first-come") in PARTS:
            lines += [name, *(f"  {key}: {value}" for key, value in facts[name].items())]
    return "\n".join(lines)


def answered(outcome: Outcome) -> float | str:
    """Return the seconds of a request that was answered with an image, else its error."""
    return round(outcome.seconds, 3) if outcome.image is not None else outcome.error


def lone_seconds(client: Client, fields: Mapping[str, Any] = SHORT, count: int = 20) -> list[float]:
    """Return the sorted seconds of requests one after the other."""
    return sorted(send(client, {**fields, "seed": n}).seconds for n in range(count))


def is_ready(server: Server) -> bool:
    url = f"http://{server.ports.host}:{server.ports.http}/v2/health/ready"
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def kills(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Kill and stop each process while ten requests are in flight."""
    heal: dict[str, list[float]] = {}
    noticed: list[float] = []
    errors: Counter[str] = Counter()
    answered = 0
    targets = [(name, sign) for name in (*server.python_models, *SERVERS) for sign in (signal.SIGKILL, signal.SIGSTOP)]
    for name, sign in targets * args.rounds:
        with ThreadPoolExecutor(10) as pool, Client(server.url) as client:
            flying = [pool.submit(send, client, {**LONG, "seed": n}) for n in range(10)]
            time.sleep(0.3)
            pid = server.pid if name in SERVERS else stubs(server.pid)[name].pid
            heals, start = server.ledger.heals, time.monotonic()
            os.kill(pid, sign)
            while sign == signal.SIGKILL and is_ready(server) and time.monotonic() - start < 10:
                time.sleep(0.01)
            if sign == signal.SIGKILL:
                noticed.append(time.monotonic() - start)
            while (sign == signal.SIGKILL and server.ledger.heals == heals) or not is_ready(server):
                if ended := server.wait(0.01):
                    raise ended
            probe = send(client, {**SHORT, "seed": 99})
            heal.setdefault(f"{sign.name} {name}", []).append(time.monotonic() - start)
            outcomes = [future.result() for future in flying]
        answered += sum(outcome.image is not None for outcome in outcomes)
        errors.update(outcome.error[:90] for outcome in (*outcomes, probe) if outcome.image is None)
    return {
        "rounds": args.rounds,
        "seconds_until_not_ready_max": round(max(noticed), 2),
        "seconds_until_a_new_image_max": {name: round(max(values), 2) for name, values in heal.items()},
        "requests_in_flight": 10 * len(targets) * args.rounds,
        "answered": answered,
        "errors": dict(errors),
    }


def cancels(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Abandon requests in several ways; each time a plain request follows at once."""
    found: dict[str, Any] = {}
    with Client(server.url) as client:
        lone_seconds(client)
        found["lone_seconds_median"] = percentile(lone_seconds(client), 50)
        for name, count, fields, wait in (("8 of 100 steps", 8, HUGE, 1.0), ("200 at once", 200, SHORT, 0.15)):
            seconds = []
            for turn in range(5):
                calls = [
                    client._grpc.async_infer(
                        "flux2", fields_to_inputs({**fields, "seed": n}), callback=lambda result, error: None
                    )
                    for n in range(count)
                ]
                time.sleep(wait)
                for call in calls:
                    call.cancel()
                seconds.append(answered(send(client, {**SHORT, "seed": turn})))
                while server.ledger.occupied:
                    time.sleep(0.01)
            found[f"seconds_after_cancelling_{name.replace(' ', '_')}"] = seconds
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: send(client, {**HUGE, "seed": n}, timeout=0.5), range(8)))
            found["seconds_after_8_deadlines"] = answered(send(client, SHORT))
    return found


def overload(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Send ten times the capacity for a while, open loop."""
    with Client(server.url) as client:
        lone_seconds(client)
        lone = lone_seconds(client, count=40)
        with ThreadPoolExecutor(8) as pool:
            start = time.perf_counter()
            list(pool.map(lambda n: send(client, {**SHORT, "seed": n}), range(80)))
            capacity = 80 / (time.perf_counter() - start)
        memory = _memory(server)
        due = poisson_times(10 * capacity, args.seconds)
        sent, occupied = open_loop(server.url, due, lambda n: {**SHORT, "seed": n}, lambda: server.ledger.occupied)
        most = max(occupied)
        accepted = [outcome.seconds - outcome.late for outcome in sent if outcome.image is not None]
        refused = [outcome.seconds - outcome.late for outcome in sent if outcome.image is None]
        after = _memory(server)
    return {
        "capacity_per_second": round(capacity, 1),
        "offered_per_second": round(len(sent) / args.seconds, 1),
        "lone_seconds_p95": percentile(lone, 95),
        "most_in_flight": most,
        "accepted": len(accepted),
        "accepted_per_second": round(len(accepted) / args.seconds, 1),
        "accepted_seconds_p50_p95": [percentile(accepted, 50), percentile(accepted, 95)],
        "refused": len(refused),
        "refused_seconds_p50_p95": [percentile(refused, 50), percentile(refused, 95)],
        "errors": dict(Counter(o.sort for o in sent if o.image is None)),
        "memory_mb_before_after": [round(memory), round(after)],
    }


def mixed(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Send three short requests to one long one at 80 % of what that mix can be served at, and the short ones alone.

    Arriving at random, short requests wait for each other: alone they show what no order of work can be faster than.
    """
    mix = [SHORT, SHORT, SHORT, LONG]
    with Client(server.url) as client:
        lone_seconds(client)
        lone = {"short": lone_seconds(client, SHORT, 40), "long": lone_seconds(client, LONG, 10)}
        with ThreadPoolExecutor(8) as pool:
            start = time.perf_counter()
            list(pool.map(lambda n: send(client, {**mix[n % 4], "seed": n}), range(80)))
            capacity = 80 / (time.perf_counter() - start)
        rate = args.rate or 0.8 * capacity
        due = poisson_times(0.75 * rate, args.seconds)
        only, _ = open_loop(server.url, due, lambda n: {**SHORT, "seed": n})
        due = poisson_times(rate, args.seconds)
        kinds = random.Random(2).choices([SHORT, LONG], [3, 1], k=len(due))
        done, _ = open_loop(server.url, due, lambda n: {**kinds[n], "seed": n})
    unmixed = [outcome.seconds for outcome in only if outcome.image is not None]
    short, long = (
        [o.seconds for o in done if kinds[o.number] is kind and o.image is not None] for kind in (SHORT, LONG)
    )
    return {
        "capacity_per_second": round(capacity, 2),
        "offered_per_second": round(rate, 2),
        "lone_p95": {name: percentile(values, 95) for name, values in lone.items()},
        "short_p50_p95_without_long_ones": [percentile(unmixed, 50), percentile(unmixed, 95)],
        "short_p50_p95": [percentile(short, 50), percentile(short, 95)],
        "long_p50_p95": [percentile(long, 50), percentile(long, 95)],
        "short_p95_over_lone_p95": round((percentile(short, 95) or 0) / (percentile(lone["short"], 95) or 1), 2),
        "errors": sum(o.image is None for o in done),
    }


def throughput(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Compare images per second with the same pipeline in this process, and with diffusers, one after the other."""
    from pipeline.local import LocalPipeline

    local = LocalPipeline(args.deployment)
    found: dict[str, Any] = {}
    rates: dict[str, list[float]] = {}
    with ExitStack() as stack:
        client = stack.enter_context(Client(server.url))
        peer = None
        if args.checkpoint is not None:
            peer = stack.enter_context(DiffusersRate(args.checkpoint, SHORT))
            peer.images_per_second(2)
            found["diffusers_threads"] = peer.threads
        lone_seconds(client)
        for _ in range(4):
            start = time.perf_counter()
            for n in range(24):
                local.generate({**SHORT, "seed": n})
            rates.setdefault("local", []).append(24 / (time.perf_counter() - start))
            if peer is not None:
                rates.setdefault("diffusers", []).append(peer.images_per_second(24))
            for width in (8, 16):
                with ThreadPoolExecutor(width) as pool:
                    start = time.perf_counter()
                    list(pool.map(lambda n: send(client, {**SHORT, "seed": n}), range(64)))
                    rates.setdefault(f"{width} in flight", []).append(64 / (time.perf_counter() - start))
    medians = {name: float(np.median(values)) for name, values in rates.items()}
    found["images_per_second"] = {name: round(value, 2) for name, value in medians.items()}
    for base in ("local", "diffusers"):
        if base in medians:
            served = {name: value for name, value in medians.items() if name.endswith("in flight")}
            found[f"ratio_to_{base}"] = {name: round(value / medians[base], 2) for name, value in served.items()}
    return found


def soak(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Send many requests of mixed sizes and steps, cancel some, kill processes in the middle."""
    chance = random.Random(3)
    wishes: list[dict[str, Any]] = [
        {
            "prompt": PROMPT,
            "seed": n % 40,
            "steps": (1, 2, 4, 8)[n % 4],
            "width": (64, 128)[n % 2],
            "height": (64, 128, 96)[n % 3],
        }
        for n in range(120)
    ]
    with Client(server.url) as client:
        twins = [send(client, wish).image for wish in wishes]
        with ThreadPoolExecutor(12) as pool:  # wider engine calls than those of the twins take their memory now
            list(pool.map(lambda n: send(client, wishes[n % 120]), range(360)))
        memory = _memory(server)
        answers: Counter[str] = Counter()
        lock = threading.Lock()
        dead = set(chance.sample(range(args.requests // 10, args.requests), 4))

        def one(n: int) -> None:
            if n in dead:
                while not (found := stubs(server.pid)):  # it is being restarted
                    time.sleep(0.1)
                os.kill(found[chance.choice(sorted(found))].pid, signal.SIGKILL)
            cancelled = n % 10 == 7
            while True:
                outcome = send(client, wishes[n % 120], timeout=0.05 if cancelled else 120)
                kind = "wrong image" if outcome.image not in (None, twins[n % 120]) else "image"
                if outcome.image is None:
                    kind = "cancelled" if cancelled else outcome.error.replace(server.url, "HOST")
                with lock:
                    answers[kind] += 1
                if outcome.image is not None or cancelled or not LOST.search(outcome.error):
                    return
                time.sleep(0.2)  # as a client would that sends it again

        with ThreadPoolExecutor(12) as pool:
            list(pool.map(one, range(args.requests)))
        time.sleep(1)
        after = _memory(server)
    return {
        "requests": args.requests,
        "answers": dict(answers),
        "heals": server.ledger.heals,
        "in_flight_afterwards": server.ledger.occupied,
        "memory_mb_before_after": [round(memory), round(after)],
    }


def wrong(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Send malformed requests over gRPC and HTTP, half each, beside a neighbour whose requests are timed."""
    http = f"{server.ports.host}:{server.ports.http}"
    done = threading.Event()
    seconds: list[float] = []
    with Client(server.url) as client:
        lone_seconds(client)
        lone = lone_seconds(client, count=40)

        def neighbour() -> None:
            while not done.is_set():
                outcome = send(client, {**SHORT, "seed": 1})
                seconds.append(outcome.seconds if outcome.image is not None else float("inf"))

        thread = threading.Thread(target=neighbour)
        thread.start()
        seen = malformed.send(server.url, http, args.requests // 2)
        done.set()
        thread.join()
    return {
        "requests": args.requests // 2 * 2,
        "statuses": dict(seen.most_common()),
        "heals": server.ledger.heals,
        "in_flight_afterwards": server.ledger.occupied,
        "neighbour_lone_p50_max": [percentile(lone, 50), round(max(lone), 3)],
        "neighbour_beside_p50_max": [percentile(seconds, 50), round(max(seconds), 3)],
    }


def _memory(server: Server) -> float:
    """Return the megabytes that the server's processes occupy for themselves."""
    total = 0
    for pid in (server.pid, *(stub.pid for stub in stubs(server.pid).values())):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean", "Private_Dirty")):
                total += int(line.split()[1])
    return total / 1024


PARTS: dict[str, Callable[[Server, argparse.Namespace], dict[str, Any]]] = {
    "kills": kills,
    "cancels": cancels,
    "overload": overload,
    "mixed": mixed,
    "throughput": throughput,
    "soak": soak,
    "malformed": wrong,
}
