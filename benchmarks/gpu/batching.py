"""Serve requests with different step counts on one GPU: each alone in turn, or all live ones batched step by step.

Arrivals are random with a fixed seed, at 80 % of the rate that would saturate the card with requests generated one by
one. The loop is the server's own (pipeline/denoise.py) with a torch engine; text encoder and VAE are not included.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.cases import Case, RunSettings, variant_of
from benchmarks.gpu.clock import clock, percentile
from benchmarks.gpu.modes import Call, mode_of
from benchmarks.gpu.parts import Measure, build
from kit.dtypes import numpy_type, to_array, to_tensor
from kit.engine import Array
from kit.ports import Ports, ports
from kit.variants import Variant
from pipeline.denoise import Denoiser
from pipeline.live_request import LiveRequest
from pipeline.request import Limits, check
from runtimes.aoti import buckets
from runtimes.aoti.engine import pad

STEPS = ((4, 0.6), (8, 0.3), (20, 0.1))  # step counts and their frequencies
LOAD = 0.8


class TorchEngine:
    """A compiled torch module with the interface of an engine; batches are padded to powers of two."""

    def __init__(self, variant: Variant, call: Call, most: int, device: str) -> None:
        self.ports: Ports = ports("transformer", variant, "bf16")
        self.call, self.device = call, device
        self.batches = [{buckets.BATCH: 1 << k} for k in range(most.bit_length())]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        rows = len(inputs["timestep"])
        made = []
        for part in buckets.calls(self.batches, {buckets.BATCH: rows}):
            batch = self.batches[part.bucket][buckets.BATCH]
            given = {
                port.name: pad(to_tensor(inputs[port.name][part.start : part.stop]), batch).to(self.device)
                for port in self.ports.inputs
            }
            made.append(self.call(given)[: part.stop - part.start].cpu())
        return {"velocity": to_array(torch.cat(made))}


def open_batching(settings: RunSettings, _: str, policy: str) -> Measure:
    """Set up the loop; `one-by-one` admits one request at a time."""
    variant = variant_of(settings)

    def measure(case: Case) -> dict[str, Any]:
        mode = "graphs" if mode_of("fp8", settings).launch == "graphs" else "compile"
        engine = TorchEngine(variant, build(settings, variant, "transformer", mode), case.batch, settings.device)
        single = warm_up(variant, engine, case, settings)
        mean_steps = sum(steps * share for steps, share in STEPS)
        gap = single * mean_steps / LOAD
        live = case.batch if policy == "step-level" else 1
        return run(variant, engine, case.side, arrivals(settings.requests, gap), live) | {
            "flops": 0.0,
            "step_seconds_alone": single,
            "load": LOAD,
            "live": live,
        }

    return measure


def warm_up(variant: Variant, engine: TorchEngine, case: Case, settings: RunSettings) -> float:
    """Compile every batch size before the measurement; returns the seconds per step of a single request."""
    denoiser = Denoiser(variant, "bf16", engine, max_rows=case.batch)
    for batch in (sizes[buckets.BATCH] for sizes in engine.batches):
        denoiser.step([job(variant, denoiser, case.side, 4) for _ in range(batch)])

    def one() -> None:
        denoiser.step([job(variant, denoiser, case.side, 4)])

    return float(clock(one, settings.device, settings.seconds)["median"])


def arrivals(count: int, gap: float) -> list[tuple[float, int]]:
    """Draw arrival times and step counts, identical for every policy."""
    draw = random.Random(5)
    made, now = [], 0.0
    counts, shares = [steps for steps, _ in STEPS], [share for _, share in STEPS]
    for _ in range(count):
        now += draw.expovariate(1 / gap)
        made.append((now, draw.choices(counts, shares)[0]))
    return made


def job(variant: Variant, denoiser: Denoiser, side: int, steps: int) -> LiveRequest:
    """Admit a request; its prompt embedding is noise, which does not change the time."""
    shape = (variant.text_tokens, variant.transformer.joint_dim)
    embeds = np.zeros(shape, np.float32).astype(numpy_type("bf16"))
    fields = {"prompt": "noise", "seed": 1, "width": side, "height": side, "steps": steps}
    request = check(fields, variant, Limits(min_side=Variant.pixels_per_token))
    return denoiser.admit(request, embeds)


def run(
    variant: Variant, engine: TorchEngine, side: int, wanted: list[tuple[float, int]], most_live: int
) -> dict[str, Any]:
    """Serve the arrivals in real time; latency is measured from arrival to the last step."""
    denoiser = Denoiser(variant, "bf16", engine, max_rows=most_live)
    waiting = list(wanted)
    live: list[tuple[float, LiveRequest]] = []
    latencies: list[float] = []
    begin = time.perf_counter()
    while waiting or live:
        now = time.perf_counter() - begin
        while waiting and waiting[0][0] <= now and len(live) < most_live:
            arrived, steps = waiting.pop(0)
            live.append((arrived, job(variant, denoiser, side, steps)))
        if not live:
            time.sleep(max(0.0, waiting[0][0] - now))
            continue
        denoiser.step([one for _, one in live])
        now = time.perf_counter() - begin
        failed = next((one.error for _, one in live if one.error), None)
        if failed:
            raise RuntimeError(failed)
        latencies += [now - arrived for arrived, one in live if one.done]
        live = [(arrived, one) for arrived, one in live if not one.done]
    seconds = time.perf_counter() - begin
    seen = denoiser.occupancy
    return {
        "median": median(latencies),
        "p95": percentile(latencies, 0.95),
        "runs": len(latencies),
        "peak_bytes": None,
        "images_per_minute": 60.0 * len(latencies) / seconds,
        "rows_per_call": seen.rows / seen.calls,
        "fullest_call": seen.fullest,
    }
