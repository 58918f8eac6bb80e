"""config.pbtxt, compared whole with tests/expected, and the wiring of the ensemble."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as proto

from kit.ports import SERVED_PARTS, parts_of, ports
from kit.variants import VARIANTS
from pipeline.request import FIELDS, Limits
from serve.settings import Settings, Tuning
from serve.triton_config import configs

EXPECTED = Path(__file__).parents[1] / "expected"


def settings(name: str) -> Settings:
    variant = VARIANTS[name]
    parts = {part: ports(part, variant, "fp32") for part in parts_of(variant)}
    return Settings(variant, "fp32", Limits(), Tuning(threads=2), parts)


@pytest.mark.parametrize("name", ["klein-4b", "klein-base-4b"])
def test_configs_are_the_expected_text(name: str) -> None:
    made = configs(settings(name))
    for model, text in made.items():
        assert text == (EXPECTED / name / f"{model}.pbtxt").read_text(), model
    assert set(made) == {path.stem for path in (EXPECTED / name).iterdir()}


def test_a_deployment_for_triton_26_11_differs_in_its_ensembles_only() -> None:
    base = settings("klein-4b")
    made, default = configs(replace(base, tuning=replace(base.tuning, triton="26.11"))), configs(base)
    folder = EXPECTED / "klein-4b-triton-26.11"
    assert {model for model in made if made[model] != default[model]} == {path.stem for path in folder.iterdir()}
    for path in folder.iterdir():
        assert made[path.stem] == path.read_text()


def test_the_limit_of_an_ensemble_is_that_of_live_requests() -> None:
    made = configs(replace(settings("dev"), tuning=Tuning(triton="26.11", live_requests=3)))
    assert all("max_inflight_requests: 3\n" in made[stage] for stage in ("prompt_stage", "image_stage"))


@pytest.mark.parametrize("stage", ["prompt_stage", "image_stage"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_of_an_ensemble_has_one_source_and_equal_shapes(name: str, stage: str) -> None:
    made = {model: text_format.Parse(text, proto.ModelConfig()) for model, text in configs(settings(name)).items()}
    ensemble = made[stage]
    source = {wire.name: (wire.data_type, tuple(wire.dims)) for wire in ensemble.input}
    used: set[str] = set()
    for step in ensemble.ensemble_scheduling.step:
        model = made[step.model_name]
        axis = [-1] if model.max_batch_size else []
        shapes = {w.name: (w.data_type, (*axis, *w.dims)) for w in (*model.input, *model.output)}
        assert {w.name for w in model.input if not w.optional} <= set(step.input_map) <= {w.name for w in model.input}
        for port, tensor in step.input_map.items():
            assert source[tensor] == shapes[port], (step.model_name, port)
            used.add(tensor)
        for port, tensor in step.output_map.items():
            assert tensor not in source, f"{tensor} has two sources"
            source[tensor] = shapes[port]
    for wire in ensemble.output:
        assert source[wire.name] == (wire.data_type, tuple(wire.dims))
        used.add(wire.name)
    assert used == set(source)  # Triton rejects an ensemble with a tensor that nothing reads


def test_a_deployment_without_references_has_no_model_for_images() -> None:
    base = settings("klein-4b")
    without = {part: base.ports[part] for part in SERVED_PARTS}
    assert set(configs(base)) - set(configs(replace(base, ports=without))) == {"vae_encoder"}  # type: ignore[arg-type]


def test_clients_send_the_same_fields_to_both_front_models() -> None:
    made = {model: text_format.Parse(text, proto.ModelConfig()) for model, text in configs(settings("dev")).items()}
    fields = [field.name for field in FIELDS]
    assert [wire.name for wire in made["flux2"].input] == fields
    assert list(made["flux2"].input) == list(made["flux2_stream"].input)
    assert {wire.name for wire in made["flux2"].output} < {wire.name for wire in made["flux2_stream"].output}
    assert made["flux2_stream"].model_transaction_policy.decoupled


def test_settings_survive_the_disk(tmp_path: Path) -> None:
    made = replace(settings("dev"), limits=Limits(max_steps=7), tuning=Tuning(live_requests=3))
    made.write(tmp_path)
    assert Settings.read(tmp_path) == made


def test_no_model_is_a_sequence_model_or_has_a_queue_limit_of_its_own() -> None:
    """perf_analyzer treats an ensemble with a sequence model as one; the front model alone admits requests."""
    for text in configs(settings("dev")).values():
        assert "sequence" not in text
        assert "queue_policy" not in text
