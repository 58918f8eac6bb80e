"""One part in several runtimes beside each other: time of a call, memory, and the share of what the machine can do.

Each contender runs in a process of its own that waits while others run. In each round every contender is visited
between two visits of the baseline (baseline, contender, contender, baseline), so that a machine that becomes slower
does so for both; the ratio is of the medians of a round, with a 95 % bootstrap interval over rounds. The ceilings are
measured in the same run: the fastest square product in each type, and a copy in memory. The share is of the product in
the type in which the contender multiplies most.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.compare import interval
from benchmarks.engine_contenders import PEER, Contender, command, contenders_of, multiplies_in, recipe_of, variant_of
from benchmarks.engine_worker import Case, TorchRuntime
from benchmarks.machine import describe
from kit.errors import CheckFailed, UsageError
from kit.graph_runtimes import GRAPH_RUNTIMES
from kit.image_size import size_problem
from kit.ports import PartName
from kit.variants import Variant
from planner import flops
from planner.weights import weights

PARTS: tuple[PartName, ...] = ("text_encoder", "transformer", "vae_encoder", "vae_decoder")
SIDES = (512, 1024, 2048)  # of square products; the fastest is the ceiling
COPY_BYTES = 256 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "contenders",
        nargs="+",
        metavar="RUNTIME=SOURCE",
        help=f"an artifact in {', '.join(GRAPH_RUNTIMES)} or, of engines and packages, own; or a checkpoint in "
        f"{', '.join(get_args(TorchRuntime))}",
    )
    parser.add_argument("--part", choices=PARTS, default="transformer", help="the part to run")
    parser.add_argument("--size", default="128x128", metavar="WxH", help="image size in pixels")
    parser.add_argument("--rows", type=int, default=1, metavar="N", help="rows per call")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="turns of each contender; contenders take turns"
    )
    parser.add_argument("--seconds", type=float, default=1.0, metavar="SECONDS", help="shortest duration of a turn")
    parser.add_argument(
        "--optimum-python",
        type=Path,
        metavar="FILE",
        help=f"Python of an environment with optimum-intel, for {PEER}=FOLDER that its pipeline saved; default: none",
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="threads of each runtime; 0: the runtime's default"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; the first contender is the baseline. Raises UsageError for wrong use, CheckFailed if one fails."""
    contenders, case = contenders_of(args.contenders), _case(args)
    variant = variant_of(contenders[0])
    commands = {c.name: command(c, case, variant, args.optimum_python) for c in contenders}
    ceilings = measure_ceilings()
    workers: dict[str, Worker] = {}
    try:
        for contender in contenders:
            workers[contender.name] = Worker(contender.name, commands[contender.name])
        rounds = _rounds(workers, args.rounds, args.seconds)
        peaks = {name: worker.end() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.kill()
    operations = case.rows * _operations(variant, case)
    return {
        "case": asdict(case),
        "machine": describe(),
        "ceilings": ceilings,
        "gigaflop_of_a_call": operations / 1e9,
        "baseline": contenders[0].name,
        "contenders": {
            c.name: _facts(c, rounds, contenders[0].name, peaks[c.name], operations, ceilings)
            | {"weight_bytes": weights(case.part, variant).bytes(recipe_of(c))}
            for c in contenders
        },
    }


def table(facts: dict[str, Any]) -> str:
    """Format the measurements as lines of text."""
    case, ceilings = facts["case"], facts["ceilings"]
    lines = [
        f"{case['part']}, {case['width']}x{case['height']}, {case['rows']} rows, "
        f"{facts['gigaflop_of_a_call']:.3g} GFLOP a call; baseline: {facts['baseline']}",
        "ceilings: "
        + ", ".join(f"{name} {value:.0f} GFLOP/s" for name, value in ceilings["gigaflops_per_second"].items())
        + f", copies {ceilings['copy_gigabytes_per_second']:.1f} GB/s",
        f"{'':40}  {'median':>9}  {'p95':>9}  {'of ceiling':>10}  {'memory':>8}  as fast as the baseline",
    ]
    for name, row in facts["contenders"].items():
        low, high = row["speedup_interval"]
        lines.append(
            f"{name:40}  {1e3 * row['median_seconds']:6.1f} ms  {1e3 * row['p95_seconds']:6.1f} ms  "
            f"{row['share_of_ceiling']:10.0%}  {row['peak_memory_bytes'] / 1e9:5.2f} GB  "
            f"{row['speedup']:.2f} ({low:.2f} to {high:.2f})"
        )
    return "\n".join(lines)


def measure_ceilings(seconds: float = 0.3) -> dict[str, Any]:
    """Measure the fastest square product in each type, and a copy within memory, with all cores."""
    import torch

    def fastest(make: Callable[[int], Callable[[], Any]]) -> float:
        return max(2.0 * side**3 / _least(make(side), seconds) for side in SIDES) / 1e9

    def product(dtype: torch.dtype) -> Callable[[int], Callable[[], Any]]:
        def make(side: int) -> Callable[[], Any]:
            a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
            return lambda: a @ b

        return make

    def int8(side: int) -> Callable[[], Any]:
        a, b = (torch.randint(-127, 128, (side, side), dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b)

    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        "gigaflops_per_second": {
            "fp32": fastest(product(torch.float32)),
            "bf16": fastest(product(torch.bfloat16)),
            "int8": fastest(int8),
        },
        "copy_gigabytes_per_second": 2 * COPY_BYTES / _least(lambda: target.copy_(source), seconds) / 1e9,
    }


class Worker:
    """The process of a contender."""

    def __init__(self, name: str, command: Sequence[str]) -> None:
        self.name = name
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            self._answer()
        except BaseException:
            self.kill()
            raise

    def visit(self, seconds: float) -> list[float]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        found: list[float] = self._answer()
        return found

    def end(self) -> int:
        """Return the peak memory of the process, in bytes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        return int(self._answer()["peak"])

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not sent to a dead process
                pipe.close()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CheckFailed(f"{self.name}: its process ended with code {self._process.wait()}")
        answer = json.loads(line)
        if isinstance(answer, dict) and "error" in answer:
            raise CheckFailed(f"{self.name}: {answer['error']}")
        return answer


def _rounds(workers: dict[str, Worker], count: int, seconds: float) -> list[dict[str, dict[str, list[float]]]]:
    """Return for each round and contender the seconds of its calls, and of the baseline's around them."""
    baseline, *others = workers
    found = []
    for _ in range(count):
        turn: dict[str, dict[str, list[float]]] = {}
        for name in others or [baseline]:
            before = workers[baseline].visit(seconds)
            own = workers[name].visit(seconds) + workers[name].visit(seconds)
            turn[name] = {"own": own, "baseline": before + workers[baseline].visit(seconds)}
        found.append(turn)
    return found


def _facts(
    contender: Contender,
    rounds: Sequence[dict[str, dict[str, list[float]]]],
    baseline: str,
    peak: int,
    operations: float,
    ceilings: dict[str, Any],
) -> dict[str, Any]:
    if contender.name == baseline:
        calls = [second for turn in rounds for visits in turn.values() for second in visits["baseline"]]
        own = other = [float(np.median(next(iter(turn.values()))["baseline"])) for turn in rounds]
    else:
        calls = [second for turn in rounds for second in turn[contender.name]["own"]]
        own, other = ([float(np.median(turn[contender.name][key])) for turn in rounds] for key in ("own", "baseline"))
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    rate = operations / float(np.median(calls)) / 1e9
    return {
        "call_seconds": calls,
        "median_seconds": float(np.median(calls)),
        "p95_seconds": float(np.percentile(calls, 95)),
        "gigaflops_per_second": rate,
        "share_of_ceiling": rate / ceilings["gigaflops_per_second"][multiplies_in(contender)],
        "peak_memory_bytes": peak,
        "speedup": float(np.median(ratios)),
        "speedup_interval": list(interval([1.0] * len(ratios), ratios)) if len(ratios) > 1 else [ratios[0]] * 2,
    }


def _operations(variant: Variant, case: Case) -> float:
    tokens = variant.tokens(case.width, case.height)
    match case.part:
        case "text_encoder":
            return flops.text_encoder(variant.text_encoder, variant.text_tokens).total
        case "vae_decoder":
            return flops.vae_decoder(variant.vae, case.width, case.height).total
        case "vae_encoder":
            return flops.vae_encoder(variant.vae, case.width, case.height).total
    return flops.transformer(variant.transformer, tokens, variant.text_tokens).total


def _case(args: argparse.Namespace) -> Case:
    size = re.fullmatch(r"(\d+)x(\d+)", args.size)
    if size is None:
        raise UsageError(f"--size {args.size}: write WIDTHxHEIGHT, such as 1024x1024")
    width, height = map(int, size.groups())
    if problem := size_problem(width, height, 1):
        raise UsageError(f"--size {problem}")
    for name in ("rows", "rounds"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} is not positive")
    if not args.seconds > 0:
        raise UsageError(f"--seconds {args.seconds:g} is not positive")
    return Case(args.part, width, height, args.rows, args.threads)


def _least(call: Callable[[], Any], seconds: float) -> float:
    """Return the seconds of the fastest of the calls that fit into some seconds."""
    call()
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least
