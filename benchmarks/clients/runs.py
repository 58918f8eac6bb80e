"""Run other people's load generators on `flux2`, and read throughput and latency from what they write."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.clients import tools
from kit.errors import CheckFailed
from serve.wire import FRONT

WINDOWS = 3  # perf_analyzer measures until so many windows in a row are alike
LOCUST_FILE = """from locust import FastHttpUser, task


class Painter(FastHttpUser):
    @task
    def paint(self):
        self.client.post("/v2/models/{model}/generate", json={body})
"""


@dataclass(frozen=True)
class Job:
    """What a tool is asked for."""

    grpc: str  # HOST:PORT
    http: str
    fields: Mapping[str, Any]
    concurrency: int
    requests: int
    seconds: float  # that the requests take by the kit's own client; for tools that stop by time
    tokenizer: Path | None  # a folder that AIPerf can count tokens with
    into: Path  # an empty folder for the tool's own output


@dataclass(frozen=True)
class Result:
    """What a tool says it measured; seconds are those of a request."""

    per_second: float
    p50: float
    p95: float
    requests: int
    errors: int


def perf_analyzer(protocol: str) -> Callable[[Job, Path], Result]:
    """Return the run of NVIDIA's perf_analyzer over gRPC or HTTP."""

    def run(job: Job, cache: Path) -> Result:
        program = tools.perf_analyzer(cache)
        data, out = job.into / "input.json", job.into / "output.csv"
        data.write_text(json.dumps({"data": [{name: [value] for name, value in job.fields.items()}]}))
        words = ["-m", FRONT, "-i", protocol, "-u", job.grpc if protocol == "grpc" else job.http]
        words += ["--input-data", str(data), "--concurrency-range", str(job.concurrency), "--percentile", "95"]
        words += ["--measurement-mode", "count_windows", "--measurement-request-count", str(job.requests // WINDOWS)]
        words += ["--stability-percentage", "999", "-f", str(out)]  # the machine's noise is for the reader to judge
        _run([str(program), *words], job, {"LD_LIBRARY_PATH": str(program.parent / "lib")})
        return read_perf_analyzer(out, job)

    return run


def read_perf_analyzer(path: Path, job: Job) -> Result:
    (row,) = csv.DictReader(path.read_text().splitlines())
    p50, p95 = (float(row[f"p{percent} latency"]) / 1e6 for percent in (50, 95))
    return Result(float(row["Inferences/Second"]), p50, p95, job.requests, 0)


def aiperf(job: Job, cache: Path) -> Result:
    """Run NVIDIA's AIPerf over Triton's JSON endpoint, by its endpoint type `template`."""
    program = tools.in_own_environment("aiperf", cache)
    prompt = {"text": job.fields["prompt"]}
    rest = json.dumps({**{k: v for k, v in job.fields.items() if k != "prompt"}, "response_encoding": "base64"})
    template, prompts = job.into / "payload.json.j2", job.into / "prompts.jsonl"
    template.write_text('{"prompt": {{ text|tojson }}, ' + rest[1:] + "\n")
    prompts.write_text(json.dumps(prompt) + "\n")
    words = ["profile", "-m", FRONT, "--endpoint-type", "template", "--url", f"http://{job.http}"]
    words += ["--custom-endpoint", f"/v2/models/{FRONT}/generate", "--extra-inputs", f"payload_template:{template}"]
    words += ["--extra-inputs", "response_field:image", "--input-file", str(prompts)]
    words += ["--custom-dataset-type", "single_turn", "--concurrency", str(job.concurrency)]
    words += [
        "--request-count",
        str(job.requests),
        "--ui",
        "none",
        "--output-artifact-dir",
        str(job.into / "artifacts"),
    ]
    words += ["--tokenizer", str(job.tokenizer)] if job.tokenizer else []
    _run([str(program), *words], job)
    return read_aiperf(job.into / "artifacts" / "profile_export_aiperf.json")


def read_aiperf(path: Path) -> Result:
    found = json.loads(path.read_text())
    latency = found["request_latency"]
    errors = round(found["completed_request_count"]["avg"] - found["request_count"]["avg"])
    return Result(
        found["request_throughput"]["avg"], latency["p50"] / 1e3, latency["p95"] / 1e3, latency["count"], errors
    )


def locust(job: Job, cache: Path) -> Result:
    """Run locust over Triton's JSON endpoint; it stops by time."""
    program = tools.in_own_environment("locust", cache)
    body = repr({**job.fields, "response_encoding": "base64"})
    file = job.into / "locustfile.py"
    file.write_text(LOCUST_FILE.replace("{model}", FRONT).replace("{body}", body))
    users = str(job.concurrency)
    words = ["-f", str(file), "--headless", "-u", users, "-r", users, "-t", f"{max(round(job.seconds), 2)}s"]
    words += [
        "--stop-timeout",
        "60",
        "--host",
        f"http://{job.http}",
        "--csv",
        str(job.into / "output"),
        "--only-summary",
    ]
    _run([str(program), *words], job)
    return read_locust(job.into / "output_stats.csv")


def read_locust(path: Path) -> Result:
    row = next(row for row in csv.DictReader(path.read_text().splitlines()) if row["Name"] == "Aggregated")
    p50, p95 = (float(row[f"{percent}%"]) / 1e3 for percent in (50, 95))
    return Result(float(row["Requests/s"]), p50, p95, int(row["Request Count"]), int(row["Failure Count"]))


def _run(command: list[str], job: Job, environment: Mapping[str, str] | None = None) -> None:
    """Run a tool with its output in a file; raises CheckFailed with its last line if it fails."""
    log = job.into / "console.txt"
    limit = 120 + 20 * job.seconds
    with log.open("wb") as stream:
        try:
            done = subprocess.run(
                command,
                cwd=job.into,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"{Path(command[0]).name} did not end within {limit:.0f} s; see {log}") from None
    if done.returncode:
        lines = log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
        raise CheckFailed(f"{Path(command[0]).name} ended with code {done.returncode}: {last}; see {log}")


TOOLS: Mapping[str, Callable[[Job, Path], Result]] = {
    "perf_analyzer": perf_analyzer("grpc"),
    "perf_analyzer-http": perf_analyzer("http"),
    "aiperf": aiperf,
    "locust": locust,
}
