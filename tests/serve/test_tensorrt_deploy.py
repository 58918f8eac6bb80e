"""Deployments of engine artifacts: config.pbtxt compared whole, the backend of each plan, limits and profiles."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as proto

from kit.artifact import verify
from kit.cuda_device import Machine
from kit.dtypes import numpy_type, to_array, to_tensor
from kit.errors import ArtifactError, CheckFailed, UsageError
from kit.ports import SERVED_PARTS, PartName, Ports, ports
from kit.variants import VARIANTS
from pipeline.images import encode
from pipeline.local import LocalPipeline
from pipeline.request import Limits
from runtimes.open import open_plans
from runtimes.ort.engine import OrtEngine
from runtimes.trt.build import artifact as engine_artifact
from runtimes.trt.build.options import EngineOptions, PlannedPlan
from runtimes.trt.profiles import Sizing, derive
from runtimes.trt.record import EngineRecord, PlanRecord, read_record
from serve import backend, tensorrt_deploy
from serve import repository as repository_module
from serve.preflight import tensorrt_options
from serve.probe import ANSWER, probe
from serve.repository import is_current, write_repository
from serve.settings import Settings, TensorRtModel, Tuning
from serve.stage import open_model
from serve.triton_config import configs
from tests.conftest import ByFamily
from tests.runtimes.test_trt_record import L4, RECORD

EXPECTED = Path(__file__).parents[1] / "expected" / "klein-4b-tensorrt"


def record(sizing: Sizing | None = None, **changed: Any) -> EngineRecord:
    """Return the record of klein-4b's engines, one plan per part."""
    variant, chosen = VARIANTS["klein-4b"], sizing or Sizing()
    plans: dict[PartName, tuple[PlanRecord, ...]] = {
        part: (PlanRecord(f"{part}/model.plan", derive(ports(part, variant, "bf16"), chosen), 1),)
        for part in SERVED_PARTS
    }
    return replace(RECORD, plans=plans, **changed)


def settings(made: EngineRecord) -> Settings:
    variant = VARIANTS["klein-4b"]
    parts: dict[PartName, Ports] = {part: ports(part, variant, "bf16") for part in SERVED_PARTS}
    return Settings(variant, "bf16", Limits(), Tuning(), parts, tensorrt_deploy.models(made), "tensorrt", True)


def test_configs_of_engines_are_the_expected_text() -> None:
    made = configs(settings(record()))
    for path in EXPECTED.iterdir():
        assert made[path.stem] == path.read_text(), path.stem
    assert {path.stem for path in EXPECTED.iterdir()} == {"text_encoder", "denoiser", "vae_decoder"}


def test_triton_loads_plans_that_contain_their_weights_and_python_loads_the_others() -> None:
    backends = {part: model.backend for part, model in tensorrt_deploy.models(record()).items()}
    assert backends == {"text_encoder": "tensorrt_plan", "transformer": "python", "vae_decoder": "tensorrt_plan"}
    for weights in ("refit", "stream", "inputs"):
        made = tensorrt_deploy.models(record(weights=weights))
        assert {model.backend for model in made.values()} == {"python"}
        text = configs(settings(record(weights=weights)))["vae_decoder"]
        assert 'backend: "python"' in text
        assert "KIND_GPU" in text
    plans = dict(record().plans)
    plans["vae_decoder"] = plans["vae_decoder"] * 2
    assert tensorrt_deploy.models(record())["vae_decoder"].backend == "tensorrt_plan"
    assert tensorrt_deploy.models(replace(record(), plans=plans))["vae_decoder"] == TensorRtModel("python", 10, 1)


def test_plans_of_tensorrt_for_rtx_are_python_models_because_the_backend_of_triton_is_the_other_library() -> None:
    made = tensorrt_deploy.models(record(compiler="tensorrt-rtx", tensorrt="1.7.1.116"))
    assert {model.backend for model in made.values()} == {"python"}
    for name in ("text_encoder", "denoiser", "vae_decoder"):
        text = configs(settings(record(compiler="tensorrt-rtx")))[name]
        assert 'backend: "python"' in text
        assert "KIND_GPU" in text


def test_triton_never_batches_more_rows_than_every_profile_accepts() -> None:
    made = configs(settings(record(Sizing(max_batch=2))))
    parsed = {name: text_format.Parse(text, proto.ModelConfig()) for name, text in made.items()}
    assert parsed["text_encoder"].max_batch_size == 2
    assert parsed["vae_decoder"].max_batch_size == 1, "a 2048 x 2048 image is alone in its call"


@pytest.mark.parametrize(
    ("sizing", "limits", "words"),
    [
        (Sizing(), Limits(), None),
        (Sizing(sides=(1024,)), Limits(), "allow 16384 image tokens, the engine accepts 4096 or fewer: --max-pixels"),
        (Sizing(sides=(1024,)), Limits(max_pixels=1024**2), "is more than the VAE's engine accepts: --max-side 1024"),
        (Sizing(sides=(1024,)), Limits(max_pixels=1024**2, max_side=1024), None),
        (Sizing(min_side=128), Limits(), "is 16 image tokens, the engine accepts 64 or more: --min-side 128"),
    ],
)  # fmt: skip
def test_limits_beyond_the_profiles_are_rejected_with_those_that_fit(
    sizing: Sizing, limits: Limits, words: str | None
) -> None:
    found = tensorrt_deploy.limits_refusal(record(sizing), limits)
    assert found is None if words is None else words in (found or ""), found


def test_a_gap_between_profiles_and_a_larger_minimum_of_the_vae_are_rejected() -> None:
    made = record()
    (plan,) = made.plans["transformer"]
    holed = replace(plan, profiles=(plan.profiles[0], plan.profiles[2], plan.profiles[4]))
    found = tensorrt_deploy.limits_refusal(replace(made, plans={**made.plans, "transformer": (holed,)}), Limits())
    assert "no profile of the transformer accepts 257 image tokens: build it with profiles that leave no gap" in (
        found or ""
    )
    other = record(Sizing(min_side=128)).plans["vae_decoder"]
    found = tensorrt_deploy.limits_refusal(replace(made, plans={**made.plans, "vae_decoder": other}), Limits())
    assert found == "--min-side 64 is less than the VAE's engine accepts: --min-side 128"


# --- a deployment on disk --------------------------------------------------------------------------------------------


def build(targets: Sequence[tuple[PlannedPlan, Path]]) -> list[PlanRecord]:
    for plan, target in targets:
        target.write_bytes(plan.file.encode())
    return [PlanRecord(plan.file, plan.profiles, len(plan.file)) for plan, _ in targets]


@pytest.fixture(scope="module")
def engine_of(artifact_of: ByFamily, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Write an engine artifact of the tiny klein with placeholder plans."""

    def make(**options: Any) -> Path:
        out = tmp_path_factory.mktemp("engines") / "engine"
        request = engine_artifact.check(artifact_of("klein"), EngineOptions("l4", compiler="tensorrt", **options), out)
        engine_artifact.write_engine(request, Machine(L4, "11.4.0.106"), out, build)
        return out

    return make


@pytest.fixture
def stand_in(artifact_of: ByFamily, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replace TensorRT by ONNX Runtime; returns the folders in which engines were opened."""
    source, opened = artifact_of("klein"), []
    manifest = verify(source)
    module: Any = ModuleType("runtimes.trt.engine")

    def open_engines(root: Path, made: EngineRecord, wanted: dict[str, Ports]) -> dict[str, OrtEngine]:
        opened.append(root)
        for part in wanted:
            assert all((root / plan.file).is_file() for plan in made.plans[part])  # type: ignore[index]
        return {part: OrtEngine(source / part / "model.onnx", manifest.part(part).ports) for part in wanted}  # type: ignore[arg-type]

    module.open_engines = open_engines
    monkeypatch.setitem(sys.modules, "tensorrt", ModuleType("tensorrt"))
    monkeypatch.setitem(sys.modules, "runtimes.trt.engine", module)
    monkeypatch.setattr(repository_module, "this_machine", lambda: Machine(L4, "11.4.0.106"))
    return opened


def test_an_engine_artifact_becomes_plans_for_triton_and_the_denoiser_with_its_engine(
    engine_of: Any, stand_in: list[Path], tmp_path: Path
) -> None:
    engine, out = engine_of(), tmp_path / "deploy"
    write_repository(engine, out, Limits(), Tuning())
    made = verify(out, kinds=("deployment",))
    assert made.parts["vae_decoder"].graph == "vae_decoder/1/model.plan"
    assert sorted(path.name for path in (out / "text_encoder" / "1").iterdir()) == ["model.plan"]
    version = out / "denoiser" / "1"
    assert (version / "transformer" / "model.plan").samefile(engine / "transformer" / "model.plan")
    assert read_record(version / "engine.json") == EngineRecord.of(verify(engine))
    assert Settings.read(version).tensorrt["transformer"] == TensorRtModel("python", 5, 1)
    assert (out / ANSWER).is_file(), "generated by the engines"
    assert set(stand_in) == {engine}, "for the known answer and, if there is a VAE encoder, for previews"
    assert is_current(out, engine, Limits(), Tuning())
    assert open_model(version, "transformer", Settings.read(version)).ports
    assert stand_in[-1] == version


def test_engines_with_references_bring_the_model_of_images(
    engine_of: Any, stand_in: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "deploy"
    write_repository(engine_of(sizing=Sizing(references=1)), out, Limits(max_references=1), Tuning(), "none")
    version = out / "vae_encoder" / "1"
    assert sorted(path.name for path in version.iterdir()) == [
        "engine.json",
        "model.py",
        "settings.json",
        "vae_encoder",
    ]
    config = text_format.Parse((out / "vae_encoder" / "config.pbtxt").read_text(), proto.ModelConfig())
    assert (config.backend, config.max_batch_size) == ("python", 0)
    assert config.instance_group[0].kind == proto.ModelInstanceGroup.KIND_GPU
    assert open_model(version, "vae_encoder", Settings.read(version)).ports
    assert stand_in[-1] == version


def test_engines_generate_the_same_image_as_the_graphs(
    engine_of: Any, stand_in: list[Path], artifact_of: ByFamily, tmp_path: Path
) -> None:
    asked = {"prompt": "a red circle", "seed": 7, "width": 64, "height": 64, "steps": 2}
    engine, graphs = (LocalPipeline(folder).generate(asked).pixels for folder in (engine_of(), artifact_of("klein")))
    assert np.array_equal(engine, graphs)


def test_parts_that_triton_cannot_load_are_python_models_with_plans_and_weights(
    engine_of: Any, stand_in: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "deploy"
    write_repository(engine_of(weights="refit", engines="per-profile"), out, Limits(), Tuning())
    version = out / "vae_decoder" / "1"
    assert {path.name for path in version.iterdir()} == {"model.py", "settings.json", "engine.json", "vae_decoder"}
    assert {"256.plan", "2048.plan", "model.onnx"} <= {path.name for path in (version / "vae_decoder").iterdir()}
    assert open_model(version, "vae_decoder", Settings.read(version)).ports


def test_kernels_that_an_engine_compiled_on_a_machine_are_no_part_of_a_deployment(
    engine_of: Any, stand_in: list[Path], tmp_path: Path
) -> None:
    engine = engine_of(weights="refit", engines="per-profile")
    (engine / "vae_decoder" / "model.0123.kernels").write_bytes(b"changes while the engine runs")
    write_repository(engine, tmp_path / "deploy", Limits(), Tuning())
    assert not list((tmp_path / "deploy").rglob("*.kernels"))


def test_an_engine_of_one_compiler_does_not_load_where_the_other_is_active(
    engine_of: Any, stand_in: list[Path], tmp_path: Path
) -> None:
    made = EngineRecord.of(verify(engine_of()))
    with pytest.raises(UsageError, match="TensorRT for RTX cannot be loaded: this process already runs tensorrt"):
        open_plans(tmp_path, replace(made, compiler="tensorrt-rtx"), {})


def test_on_another_machine_a_deployment_is_written_without_a_known_answer_or_rejected(
    engine_of: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(repository_module, "this_machine", lambda: Machine(None, None))
    with pytest.raises(UsageError, match=r"the known answer cannot be generated here: .* or pass --known-answer none"):
        write_repository(engine_of(), tmp_path / "deploy", Limits(), Tuning())
    write_repository(engine_of(), tmp_path / "deploy", Limits(), Tuning(), "none")
    assert not (tmp_path / "deploy" / ANSWER).exists()
    assert verify(tmp_path / "deploy").kind == "deployment"


def test_limits_are_checked_when_a_deployment_is_written(engine_of: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--max-pixels 262144"):
        write_repository(engine_of(sizing=Sizing(sides=(512,))), tmp_path / "d", Limits(), Tuning(), "none")


def test_only_version_compatible_plans_need_an_option_of_triton(
    engine_of: Any, deployment_of: ByFamily, tmp_path: Path
) -> None:
    write_repository(engine_of(version="compatible"), tmp_path / "new", Limits(), Tuning(), "none")
    assert tensorrt_options(tmp_path / "new") == ["--backend-config=tensorrt,version-compatible=true"]
    write_repository(engine_of(), tmp_path / "exact", Limits(), Tuning(), "none")
    assert tensorrt_options(tmp_path / "exact") == tensorrt_options(deployment_of("klein")) == []


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "engine.json").write_text("{")
    with pytest.raises(ArtifactError, match="engine.json: cannot be read .*write the deployment again"):
        read_record(tmp_path / "engine.json")


class Generator:
    """A client whose server generates the same image for every request."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels

    def generate(self, fields: Any, timeout: float, cache: str) -> Any:
        return SimpleNamespace(images=[encode(self.pixels, "png")], seconds=0.5)


def test_without_a_known_answer_the_image_must_have_its_size_and_more_than_one_color(
    engine_of: Any, tmp_path: Path
) -> None:
    write_repository(engine_of(), tmp_path / "deploy", Limits(), Tuning(), "none")
    good = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    asked: Any = Generator(good)
    assert probe(asked, tmp_path / "deploy") == 0.5
    with pytest.raises(CheckFailed, match="the image has a single color, 0 of 255; are the weights in the plans"):
        probe(Generator(np.zeros_like(good)), tmp_path / "deploy")  # type: ignore[arg-type]
    with pytest.raises(CheckFailed, match=r"an image of shape \(64, 64, 3\) was requested, the server returned \(32"):
        probe(Generator(good[:32]), tmp_path / "deploy")  # type: ignore[arg-type]


# --- bf16 between Triton and arrays ----------------------------------------------------------------------------------


class Tensor:
    """A tensor of the python backend: numpy for most types, DLPack for all."""

    def __init__(self, name: str, values: Any) -> None:
        self.name, self.values = name, values

    @classmethod
    def from_dlpack(cls, name: str, capsule: Any) -> Tensor:
        return cls(name, torch.utils.dlpack.from_dlpack(capsule))

    def to_dlpack(self) -> Any:
        return self.values.__dlpack__()

    def as_numpy(self) -> Any:
        if isinstance(self.values, torch.Tensor):
            raise RuntimeError("bf16 has no numpy type")
        return self.values


def test_bf16_is_exchanged_by_dlpack_and_every_other_type_as_numpy() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    pb: Any = SimpleNamespace(
        Tensor=Tensor,
        InferenceResponse=lambda tensors: {t.name: t for t in tensors},
        get_input_tensor_by_name=lambda request, name: request.get(name),
    )
    sent = backend.respond(pb, {"latents": values, "seed": np.array([7])})
    assert sent["latents"].values.dtype == torch.bfloat16
    read = backend.read(pb, sent, "latents", "bf16")
    assert read.dtype == numpy_type("bf16")
    assert np.array_equal(read.view(np.int16), values.view(np.int16))
    assert backend.read(pb, sent, "seed").tolist() == [7]
    assert backend.read_optional(pb, sent, "nothing", "bf16") is None


def test_tensors_share_memory_with_arrays_unless_these_are_read_only() -> None:
    values = np.zeros((2, 2), ml_dtypes.bfloat16)
    to_tensor(values)[0, 0] = 1.5
    assert float(values[0, 0]) == 1.5
    values.flags.writeable = False
    to_tensor(values)[0, 0] = 3
    assert float(values[0, 0]) == 1.5
    assert to_array(torch.ones(2, dtype=torch.bfloat16)).dtype == numpy_type("bf16")
    assert to_array(torch.ones(2, dtype=torch.uint8)).dtype == np.uint8
