"""Read a server's metrics, and tell from two readings where its requests spent their time between them."""

from __future__ import annotations

import re
import time
import urllib.request
from collections.abc import Mapping
from typing import Any

from kit.errors import UsageError
from serve.metrics import FLUSH_SECONDS
from serve.wire import DENOISER

LINE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$")
STAGES = ("tokenizer", "text_encoder", "vae_decoder", "image_encoder")  # Triton's own models beside the denoiser
Readings = Mapping[tuple[str, str], float]  # by the names of metric and model


def read(url: str) -> Readings:
    """Read the metrics at HOST:PORT, summed over labels but the model; raises UsageError if there are none."""
    time.sleep(2 * FLUSH_SECONDS)  # until the models have sent what they counted
    try:
        with urllib.request.urlopen(f"http://{url}/metrics", timeout=10) as response:
            text = response.read().decode()
    except (OSError, ValueError) as error:
        raise UsageError(f"{url}: no metrics of a server ({error}); pass its --metrics-url") from None
    return parse(text)


def parse(text: str) -> Readings:
    """Parse Prometheus' text format; the buckets of histograms are left out."""
    found: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        if (match := LINE.match(line)) and not match[1].endswith("_bucket"):
            model = re.search(r'model="([^"]*)"', match[2] or "")
            key = (match[1], model[1] if model and match[1].startswith("nv_") else "")
            found[key] = found.get(key, 0.0) + float(match[3])
    return found


def breakdown(before: Readings, after: Readings) -> dict[str, Any]:
    """Return the mean seconds of a request by stage, and what an engine call of the denoiser holds.

    `stages_seconds` are: waiting for admission, each model with its waiting and its work, and denoising: from when a
    request is in the denoiser to its latents, the rest of the whole.
    """

    def delta(name: str, model: str = "") -> float:
        return after.get((name, model), 0.0) - before.get((name, model), 0.0)

    def mean(name: str) -> float:
        return delta(f"{name}_sum") / max(delta(f"{name}_count"), 1.0)

    whole = mean("flux2_request_seconds")
    stages = {"queue": mean("flux2_queue_seconds")}
    for model in STAGES:
        requests = max(delta("nv_inference_request_success", model), 1.0)
        stages[model] = delta("nv_inference_request_duration_us", model) / 1e6 / requests
    calls = max(delta("flux2_denoiser_engine_calls_total"), 1.0)
    busy = delta("flux2_step_seconds_sum")
    images = max(delta("flux2_images_total"), 1.0)
    return {
        "request_seconds_mean": round(whole, 4),
        "stages_seconds": {
            **{name: round(seconds, 4) for name, seconds in stages.items()},
            "denoiser": round(max(whole - sum(stages.values()), 0.0), 4),
        },
        "engine_seconds_per_image": round(busy / images, 4),
        "step_seconds_mean": round(busy / calls, 5),
        "requests_per_call": round(delta("flux2_steps_total") / calls, 3),
        "rows_per_call": round(delta("flux2_denoiser_engine_rows_total") / calls, 3),
        "rejections": round(delta("flux2_rejections_total")),
    }


def parts_of_requests(before: Readings, after: Readings) -> dict[str, float]:
    """Return the mean milliseconds of a request, one at a time, by what the server did."""

    def delta(name: str, model: str = "") -> float:
        return after.get((name, model), 0.0) - before.get((name, model), 0.0)

    count = max(delta("flux2_request_seconds_count"), 1.0)

    def triton(kind: str, *models: str) -> float:
        return sum(delta(f"nv_inference_{kind}_duration_us", model) for model in models) / 1e3 / count

    found = {"request": 1e3 * delta("flux2_request_seconds_sum") / count}
    found |= {model: triton("compute_infer", model) for model in STAGES}
    found["steps"] = 1e3 * delta("flux2_step_seconds_sum") / count
    found["denoiser rest"] = triton("compute_infer", DENOISER)
    found["queues"] = triton("queue", *STAGES, DENOISER) + 1e3 * delta("flux2_queue_seconds_sum") / count
    found["copies"] = sum(triton(kind, *STAGES, DENOISER) for kind in ("compute_input", "compute_output"))
    return {**found, "rest": found["request"] - sum(value for name, value in found.items() if name != "request")}
