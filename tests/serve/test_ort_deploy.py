"""Deployments of ONNX graphs for a GPU provider of ONNX Runtime: the configuration, sizes and memory, and rejections.

No GPU runs here: what a model opens is replaced by a recorder.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as proto

from kit.cuda_device import CudaDevice, Machine
from kit.errors import UsageError
from kit.providers import PROVIDERS
from pipeline.request import Limits
from runtimes.ort import bound
from runtimes.trt import cuda
from runtimes.trt.profiles import AxisRange
from serve import ort_deploy
from serve.commands.repository import add_arguments, run
from serve.repository import write_repository
from serve.settings import OrtRuntime, Settings, Tuning
from serve.stage import open_model
from tests.conftest import ByFamily

L4 = CudaDevice("NVIDIA L4", (8, 9), 2**34, "580.65.06")


@pytest.fixture
def deployed(artifact_of: ByFamily, tmp_path: Path) -> Path:
    out = tmp_path / "deploy"
    write_repository(artifact_of("klein"), out, Limits(), Tuning(), "none", runtime="ort-cuda")
    return out


def test_all_parts_are_python_models_on_the_gpu(deployed: Path) -> None:
    for name in ("text_encoder", "denoiser", "vae_decoder", "vae_encoder"):
        config = text_format.Parse((deployed / name / "config.pbtxt").read_text(), proto.ModelConfig())
        assert config.backend == "python"
        assert config.instance_group[0].kind == proto.ModelInstanceGroup.KIND_GPU
        settings = Settings.read(deployed / name / "1")
        assert (settings.runtime, settings.gpu, settings.recipe) == ("ort-cuda", True, "fp32")
    tokenizer = text_format.Parse((deployed / "tokenizer" / "config.pbtxt").read_text(), proto.ModelConfig())
    assert tokenizer.instance_group[0].kind == proto.ModelInstanceGroup.KIND_CPU


def test_every_runtime_names_a_provider() -> None:
    assert [ort_deploy.provider_name(runtime) for runtime in get_args(OrtRuntime)] == list(PROVIDERS)


def test_sizes_and_memory_follow_the_limits(deployed: Path) -> None:
    settings = Settings.read(deployed / "denoiser" / "1")
    assert ort_deploy.profile("transformer", settings).axes["image_tokens"] == AxisRange(16, 4096, 2 * 16384)
    small = replace(settings, limits=Limits(max_references=1))
    assert ort_deploy.profile("transformer", small).axes["image_tokens"] == AxisRange(16, 4096, 16384 + 4096)
    without = replace(settings, ports={part: p for part, p in settings.ports.items() if part != "vae_encoder"})
    assert ort_deploy.profile("transformer", without).axes["image_tokens"] == AxisRange(16, 4096, 16384)
    needed = [ort_deploy.memory_limit("transformer", made, "fp32") for made in (without, small, settings)]
    assert needed == sorted(set(needed))
    assert ort_deploy.profile("vae_decoder", settings).axes["latent_width"].high == Limits().max_side // 16
    assert ort_deploy.profile("text_encoder", settings).axes["batch"] == AxisRange(1, 1, Tuning().text_batch)
    assert ort_deploy.memory_limit("transformer", settings, "fp32") > ort_deploy.memory_limit(
        "transformer", settings, "bf16"
    )


def test_a_model_opens_its_graph_with_the_provider_and_a_cache_beside_it(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr(bound, "BoundEngine", lambda *given: opened.append(given))
    monkeypatch.setattr(cuda, "Cuda", lambda: "device")
    monkeypatch.setattr(ort_deploy, "this_machine", lambda: Machine(L4, None))
    version = deployed / "denoiser" / "1"
    open_model(version, "transformer", Settings.read(version))
    ((graph, ports, row, plan, device),) = opened
    assert graph == version / "transformer" / "model.onnx"
    assert ports == Settings.read(version).ports["transformer"]
    assert (row.name, device) == ("cuda", "device")
    assert plan.cache.is_dir()
    assert plan.cache.parent == version / "transformer"
    assert plan.memory_limit


def test_a_machine_without_a_gpu_or_with_another_one_is_told_so(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings.read(deployed / "denoiser" / "1")
    monkeypatch.setattr(ort_deploy, "this_machine", lambda: Machine(None, None))
    with pytest.raises(UsageError, match="ort-cuda needs a GPU, and nvidia-smi lists none"):
        ort_deploy.open_part(deployed, "transformer", settings)
    monkeypatch.setattr(ort_deploy, "this_machine", lambda: Machine(replace(L4, compute_capability=(9, 0)), None))
    with pytest.raises(UsageError, match="runs on compute capability 8.6, 8.9, 12.0; NVIDIA L4 has 9.0"):
        ort_deploy.open_part(deployed, "transformer", replace(settings, runtime="ort-tensorrt-rtx"))


def test_what_cannot_be_deployed_so_is_rejected(artifact_of: ByFamily, tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="--runtime ort-cuda: known answers are generated on a CPU; pass --known-answer"
    ):
        write_repository(artifact_of("klein"), tmp_path / "deploy", Limits(), Tuning(), runtime="ort-cuda")


def test_the_command_takes_the_runtime(artifact_of: ByFamily, tmp_path: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [
        str(artifact_of("klein")),
        "--out",
        str(tmp_path / "d"),
        "--runtime",
        "ort-tensorrt",
        "--known-answer",
        "none",
    ]
    args = parser.parse_args(words)
    args.json = True
    run(args)
    assert Settings.read(tmp_path / "d" / "denoiser" / "1").runtime == "ort-tensorrt"
