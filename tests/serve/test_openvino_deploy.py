"""Deployments whose graphs OpenVINO runs, and the choice of the fastest runtime of this CPU."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from kit.artifact import read_manifest
from kit.errors import UsageError
from kit.graph_runtimes import GraphRuntime
from pipeline.images import decode
from pipeline.local import LocalPipeline
from pipeline.request import Limits
from serve import fastest_runtime
from serve.client import Client
from serve.launch import Server
from serve.repository import is_current, write_repository
from serve.settings import Settings, Tuning

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="OpenVINO is not installed")
FIELDS = {"prompt": "a red circle on a white background", "steps": 2, "width": 64, "height": 64, "seed": 5}


@needs_openvino
@pytest.mark.server
def test_a_deployment_of_openvino_serves_its_images(sample_artifact: Path, tmp_path: Path) -> None:
    out = tmp_path / "deploy"
    write_repository(sample_artifact, out, Limits(), Tuning(), runtime="openvino-fp32")
    assert Settings.read(out / "denoiser" / "1").runtime == "openvino-fp32"
    with Server(out, log=tmp_path / "log") as server, Client(server.url) as client:
        (image,) = client.generate(FIELDS, timeout=60).images
    served = decode(image).astype(int)
    same = LocalPipeline(sample_artifact, runtime="openvino-fp32").generate(FIELDS).pixels[0]
    other = LocalPipeline(sample_artifact).generate(FIELDS).pixels[0]
    assert np.abs(served - same).max() == 0
    assert np.abs(served - other).max() <= 2


@pytest.mark.parametrize("runtime", ["ort-cpu", "auto"])
def test_auto_writes_what_it_measured_and_chooses_the_fastest(
    runtime: str, sample_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: dict[GraphRuntime, float] = {"ort-cpu": 0.02, "openvino-fp32": 0.03, "openvino-bf16": 0.01}
    monkeypatch.setattr(fastest_runtime, "measure", lambda *_: measured)
    out = tmp_path / "deploy"
    made = write_repository(sample_artifact, out, Limits(), Tuning(), "none", runtime=runtime)  # type: ignore[arg-type]
    assert made.options.get("step_seconds") == (measured if runtime == "auto" else None)
    assert Settings.read(out / "denoiser" / "1").runtime == "ort-cpu", "bf16 rounds, and is not chosen unasked"
    assert is_current(out, sample_artifact, Limits(), Tuning())


@needs_openvino
def test_its_telemetry_is_not_loaded() -> None:
    code = (
        "import sys; from runtimes.openvino.engine import load; load().Core(); "
        "print([name for name, module in sys.modules.items() if 'openvino_telemetry' in name and module is not None])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_what_was_measured_is_told_with_what_was_not_chosen() -> None:
    seconds: dict[GraphRuntime, float] = {"ort-cpu": 1.5, "openvino-fp32": 1.25, "openvino-bf16": 0.95}
    assert fastest_runtime.fastest(seconds) == "openvino-fp32"
    assert fastest_runtime.describe(seconds) == (
        "openvino-fp32, 1.25 s a step (ort-cpu 1.5 s, openvino-bf16 0.95 s); openvino-bf16 is faster and rounds: judge "
        "it with `quantize gate --runtime openvino-bf16`"
    )
    assert fastest_runtime.describe({"ort-cpu": 1.5}) == "ort-cpu, 1.5 s a step; no other runtime is installed"


def test_every_installed_runtime_is_timed(sample_artifact: Path) -> None:
    limits = Limits(max_side=64, max_pixels=64 * 64)
    seconds = fastest_runtime.measure(sample_artifact, read_manifest(sample_artifact), limits)
    assert "ort-cpu" in seconds
    assert ("openvino-fp32" in seconds) == (find_spec("openvino") is not None)
    assert all(value > 0 for value in seconds.values())


def test_a_runtime_that_rounds_is_not_deployed_under_a_certificate_of_another(
    sample_artifact: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--require-gate: certificates do not cover openvino-bf16"):
        write_repository(
            sample_artifact, tmp_path / "out", Limits(), Tuning(), require_gate=True, runtime="openvino-bf16"
        )
