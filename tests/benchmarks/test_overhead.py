"""The parts of `benchmarks overhead` that need no server."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import overhead
from benchmarks.serving.scrape import parts_of_requests
from benchmarks.stand_in import write_stand_in
from kit.artifact import verify
from kit.sample import __path__ as sample
from kit.variants import VARIANTS
from pipeline.local import LocalPipeline

FIELDS = {"prompt": "a cat", "steps": 4, "width": 128, "height": 64, "seed": 1}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stand_in")
    write_stand_in(VARIANTS["klein-4b"], Path(sample[0]) / "checkpoint" / "tokenizer", folder)
    return folder


def test_a_stand_in_has_the_shapes_of_its_variant_and_runs(stand_in: Path) -> None:
    assert verify(stand_in, kinds=("onnx",)).variant == VARIANTS["klein-4b"]
    local = LocalPipeline(stand_in)
    assert local.embed("a cat").shape == (512, 7680)
    image = local.generate(FIELDS).pixels
    assert image.shape == (1, 64, 128, 3)
    assert image.std() > 10  # noise at half of its strength by step is still no plain grey


def test_the_stages_of_a_request_in_this_process_are_timed(stand_in: Path) -> None:
    stages = overhead.Stages(LocalPipeline(stand_in))
    png = stages.generate(FIELDS)
    assert png.startswith(b"\x89PNG")
    assert stages.generate(FIELDS) == png
    assert {name: len(values) for name, values in stages.seconds.items()} == dict.fromkeys(
        ("text_encoder", "steps", "vae_decoder", "image_encoder", "rest"), 2
    )
    assert all(value > 0 for values in stages.seconds.values() for value in values)


def test_the_causes_add_up_to_what_the_server_adds() -> None:
    readings = {
        ("flux2_request_seconds_sum", ""): 0.2,
        ("flux2_request_seconds_count", ""): 2.0,
        ("flux2_step_seconds_sum", ""): 0.1,
        ("flux2_queue_seconds_sum", ""): 0.002,
        ("nv_inference_compute_infer_duration_us", "text_encoder"): 20_000.0,
        ("nv_inference_queue_duration_us", "text_encoder"): 1_000.0,
        ("nv_inference_compute_input_duration_us", "vae_decoder"): 3_000.0,
    }
    inside = parts_of_requests({}, readings)
    assert inside["request"] == pytest.approx(100)
    assert inside["text_encoder"] == pytest.approx(10)
    assert inside["steps"] == pytest.approx(50)
    assert inside["queues"] == pytest.approx(1.5)
    assert inside["copies"] == pytest.approx(1.5)
    assert inside["rest"] == pytest.approx(37)
    own = {"text_encoder": 9.0, "steps": 48.0, "vae_decoder": 0.0, "image_encoder": 0.0, "rest": 0.0}
    found = overhead.causes(own, inside, {"gRPC": 101.0})
    assert found["steps in the engine"] == 2.0
    assert found["the client and gRPC"] == 1.0
    assert sum(found.values()) == pytest.approx(101 - sum(own.values()))
