"""`benchmarks serving` against a real tritonserver with a tiny model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import overhead
from benchmarks.__main__ import main
from benchmarks.serving.capacity import Capacity, measure_alone
from benchmarks.serving.command import Measured, _policy
from benchmarks.serving.mix import RequestClass
from benchmarks.serving.points import Target, Terms
from benchmarks.serving.policies import with_policy
from kit.artifact import verify
from serve.client import Client
from serve.launch import Server
from serve.settings import Settings
from tests.conftest import ByFamily


def test_a_running_server_is_measured_and_every_image_equals_its_twin(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"prompt": "a cat", "steps": 2, "width": 64, "height": 64}
    mix = tmp_path / "mix.json"
    mix.write_text(
        json.dumps({"short": {"share": 2, "fields": small}, "long": {"share": 1, "fields": {**small, "steps": 6}}})
    )
    metrics = f"{server.ports.host}:{server.ports.metrics}"
    words = ["serving", "--url", server.url, "--metrics-url", metrics, "--mix", str(mix), "--loads", "1"]
    assert main([*words, "--seconds", "3", "--closed-seconds", "1.5", "--lone", "1", "--price", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["capacity"]["requests_per_second"] > 0
    poisson, closed = found["loads"]
    assert poisson["arrivals"] == "poisson"
    assert poisson["planner"]["all"]["predicted_p95"] > 0
    for row in (poisson, closed):
        assert row["images_that_differ"] == 0
        assert row["errors"] == {}
        assert row["dollars_per_1000_images"] > 0
        assert row["server"]["rows_per_call"] >= 1
        stages = row["server"]["stages_seconds"]
        assert stages["denoiser"] > 0
        assert sum(stages.values()) == pytest.approx(row["server"]["request_seconds_mean"], rel=0.01)


def test_another_policy_is_measured_at_a_share_of_the_first_ones_capacity(server: Server) -> None:
    classes = [RequestClass("short", 1, {"prompt": "a cat", "steps": 2, "width": 64, "height": 64})]
    target = Target(server.url, f"{server.ports.host}:{server.ports.metrics}")
    with Client(server.url) as client:
        alone = measure_alone(client, classes, 1, target.metrics)
    assert alone.stages["short"]["vae_decoder"] > 0  # not text_encoder: the prompt may be in the cache
    measured = Measured(Terms(classes, alone, [2.0], None), Capacity([1.0], 0.5, 4.0))
    args = argparse.Namespace(policy_load=0.5, seconds=2.0, closed_seconds=1.0)
    found = _policy(target, measured, args, [])
    assert found["offered_per_second"] == 1.0
    assert found["saturated_per_second"] > 0
    assert found["images_that_differ"] == 0
    assert _policy(target, measured, args, [found])["samples"] == found["samples"]  # it is measured once


def test_a_deployment_with_another_policy_verifies_and_shares_the_weights(
    deployment_of: ByFamily, tmp_path: Path
) -> None:
    deployment = deployment_of("klein")
    made = with_policy(deployment, "whole-request", tmp_path)
    assert verify(made, kinds=("deployment",))
    assert Settings.read(made / "denoiser" / "1").tuning.policy == "whole-request"
    assert Settings.read(deployment / "denoiser" / "1").tuning.policy == "fair"
    weights = [path.relative_to(made) for path in made.rglob("*.safetensors")]
    assert weights
    assert all((made / path).samefile(deployment / path) for path in weights)
    assert with_policy(deployment, "fair", tmp_path) == deployment


def test_overhead_of_a_server_is_split_by_cause(deployment_of: ByFamily) -> None:
    found = overhead.measure(deployment_of("klein"), 64, 2)
    assert set(found["milliseconds"]) == {"in process", "gRPC", "HTTP"}
    assert [len(values) for values in found["seconds"].values()] == [2, 2, 2]
    assert sum(found["causes_milliseconds"].values()) == pytest.approx(found["added_milliseconds"]["gRPC"], abs=20)
    assert "front, ensembles and waking up" in overhead.table({"cases": {"klein": found}})
