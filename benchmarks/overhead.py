"""What a server adds to the pipeline in one process: milliseconds over gRPC and HTTP, and where they go.

The same request goes through `LocalPipeline`, over gRPC and over HTTP in turn, one at a time. The stages of the server
come from its metrics, those of the process from engines that are timed. With --true-size a stand-in is served too:
graphs with klein-4b's shapes and next to no work, whose difference is what moving its tensors costs.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.machine import describe
from benchmarks.serving import scrape
from benchmarks.serving.mix import PROMPT
from benchmarks.stand_in import write_stand_in
from kit.engine import Array, Engine
from kit.errors import CheckFailed, UsageError
from kit.variants import VARIANTS
from pipeline.images import encode
from pipeline.local import LocalPipeline
from pipeline.request import Limits
from serve.client import Client
from serve.launch import Server
from serve.repository import write_repository
from serve.settings import Tuning
from serve.wire import FRONT

FIELDS: Mapping[str, Any] = {"prompt": PROMPT, "steps": 4, "seed": 1}
TRUE_SIZE = "klein-4b"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "deployment", type=Path, metavar="DEPLOY", help="what `serve repository` wrote from ONNX graphs"
    )
    parser.add_argument("--size", type=int, default=128, metavar="N", help="side of the images")
    parser.add_argument("--rounds", type=int, default=30, metavar="N", help="requests of each way")
    parser.add_argument(
        "--true-size", action="store_true", help=f"also serve a stand-in with the shapes of {TRUE_SIZE}"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure; raises CheckFailed if the ways give different images."""
    if args.rounds < 1:
        raise UsageError("--rounds must be at least 1")
    facts: dict[str, Any] = {
        "machine": describe(),
        "load_average_before": round(os.getloadavg()[0], 1),
        "cases": {args.deployment.name: measure(args.deployment, args.size, args.rounds)},
    }
    if args.true_size:
        with tempfile.TemporaryDirectory(prefix="flux2-stand-in-") as folder:
            artifact, deployment = Path(folder) / "artifact", Path(folder) / "deployment"
            artifact.mkdir()
            tokenizer = args.deployment / "tokenizer" / "1" / "tokenizer"
            write_stand_in(VARIANTS[TRUE_SIZE], tokenizer, artifact)
            write_repository(artifact, deployment, Limits(), Tuning(), known_answer="none")
            facts["cases"][f"{TRUE_SIZE} stand-in"] = measure(deployment, 1024, args.rounds)
    return facts


def measure(deployment: Path, size: int, rounds: int) -> dict[str, Any]:
    """Run the ways in turn, and return the milliseconds of each, its stages, and the difference by cause."""
    fields = {**FIELDS, "width": size, "height": size}
    local = LocalPipeline(deployment)
    stages = Stages(local)
    with Server(deployment, log=Path(os.devnull)) as server, Client(server.url) as client:
        address, metrics = (f"{server.ports.host}:{port}" for port in (server.ports.http, server.ports.metrics))
        connection = http.client.HTTPConnection(address, timeout=120)
        ways: dict[str, Callable[[], bytes]] = {
            "in process": lambda: stages.generate(fields),
            "gRPC": lambda: client.generate(fields).images[0],
            "HTTP": lambda: over_http(connection, fields),
        }
        for _ in range(3):
            if len({way() for way in ways.values()}) != 1:
                raise CheckFailed("the server's image differs from that of the pipeline in this process")
        stages.seconds.clear()
        before = scrape.read(metrics)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            order = list(ways) if number % 2 else list(reversed(ways))
            for name in order:
                start = time.perf_counter()
                ways[name]()
                seconds[name].append(time.perf_counter() - start)
        connection.close()
        inside = scrape.parts_of_requests(before, scrape.read(metrics))
    medians = {name: 1e3 * median(values) for name, values in seconds.items()}
    own = {name: 1e3 * median(values) for name, values in stages.seconds.items()}
    return {
        "size": size,
        "seconds": {name: [round(value, 5) for value in values] for name, values in seconds.items()},
        "milliseconds": {name: round(value, 2) for name, value in medians.items()},
        "added_milliseconds": {n: round(medians[n] - medians["in process"], 2) for n in ("gRPC", "HTTP")},
        "causes_milliseconds": causes(own, inside, medians),
    }


class Stages:
    """A pipeline in this process with the seconds of its engines."""

    def __init__(self, local: LocalPipeline) -> None:
        self.local = local
        self.seconds: dict[str, list[float]] = {}
        local.text_encoder = Timed(local.text_encoder, lambda s: self._add("text_encoder", s))
        local.denoiser.engine = Timed(local.denoiser.engine, lambda s: self._add("steps", s))
        local.vae_decoder = Timed(local.vae_decoder, lambda s: self._add("vae_decoder", s))
        self._request: dict[str, float] = {}

    def generate(self, fields: Mapping[str, Any]) -> bytes:
        self._request = {}
        start = time.perf_counter()
        image = self.local.generate(fields).pixels[0]
        middle = time.perf_counter()
        encoded = encode(image, "png")
        self._add("image_encoder", time.perf_counter() - middle)
        self._add("rest", middle - start - sum(v for k, v in self._request.items() if k != "image_encoder"))
        for name, value in self._request.items():
            self.seconds.setdefault(name, []).append(value)
        return encoded

    def _add(self, name: str, seconds: float) -> None:
        self._request[name] = self._request.get(name, 0.0) + seconds


class Timed:
    """An engine that tells how long its calls take."""

    def __init__(self, engine: Engine, tell: Callable[[float], None]) -> None:
        self.engine, self.tell, self.ports = engine, tell, engine.ports

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        start = time.perf_counter()
        outputs = self.engine.run(inputs)
        self.tell(time.perf_counter() - start)
        return outputs


def over_http(connection: http.client.HTTPConnection, fields: Mapping[str, Any]) -> bytes:
    """Send one request as JSON, with the image in base64; raises CheckFailed if it is not answered."""
    body = json.dumps({**fields, "response_encoding": "base64"})
    connection.request("POST", f"/v2/models/{FRONT}/generate", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    if response.status != 200:
        raise CheckFailed(f"the server answered {response.status} over HTTP: {text[:200].decode(errors='replace')}")
    return base64.b64decode(json.loads(text)["image"])


def causes(own: Mapping[str, float], inside: Mapping[str, float], medians: Mapping[str, float]) -> dict[str, float]:
    """Split what gRPC adds, in milliseconds by cause; the sum is the added time up to means and medians.

    `own` are the stages in this process, `inside` those of the server: its models' work includes their Python code and
    the messages with their processes.
    """
    work = {name: inside[name] - own[name] for name in ("text_encoder", "vae_decoder", "image_encoder")}
    found = {
        "the client and gRPC": medians["gRPC"] - inside["request"],
        "tokenizer, checks, noise and Euler steps": inside["tokenizer"] + inside["denoiser rest"] - own["rest"],
        "steps in the engine": inside["steps"] - own["steps"],
        "text encoder": work["text_encoder"],
        "VAE decoder": work["vae_decoder"],
        "image encoder": work["image_encoder"],
        "queues of Triton": inside["queues"],
        "tensors between models": inside["copies"],
        "front, ensembles and waking up": inside["rest"],
    }
    return {name: round(value, 2) for name, value in found.items()}


def table(facts: dict[str, Any]) -> str:
    """Format the measurements as lines of text."""
    lines = []
    for name, case in facts["cases"].items():
        ways = ", ".join(f"{way} {value:.1f} ms" for way, value in case["milliseconds"].items())
        added = case["added_milliseconds"]
        lines += [f"{name}, {case['size']}x{case['size']}: {ways}"]
        lines += [f"  gRPC adds {added['gRPC']:.1f} ms, HTTP {added['HTTP']:.1f} ms; of gRPC's:"]
        lines += [f"    {cause:44} {value:7.2f} ms" for cause, value in case["causes_milliseconds"].items()]
    return "\n".join(lines)
