"""Deployments of AOTInductor packages: what is written, which sizes are served, and images of the real server."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as proto

from export.artifact import ExportConfig, export
from kit import tiny
from kit.artifact import read_manifest, verify
from kit.errors import ArtifactError, RequestError, UsageError
from pipeline.images import decode
from pipeline.local import LocalPipeline
from pipeline.request import Limits
from runtimes.aoti.record import compiled_sizes, read_record
from serve.aoti_deploy import limits_of
from serve.client import Client
from serve.launch import Server
from serve.probe import ANSWER
from serve.repository import write_repository
from serve.settings import Settings, Tuning
from serve.stage import open_model
from serve.triton_config import configs
from tests.conftest import Once

SIZES = ((64, 64),)
TINY = tiny.Tiny(double_blocks=1, single_blocks=1, heads=1)


@pytest.fixture(scope="module")
def checkpoint(once: Once) -> Path:
    return once("checkpoints/aoti", lambda out: tiny.save(out, TINY))


@pytest.fixture(scope="module")
def packages(checkpoint: Path, once: Once) -> Path:
    """Compile one package per part for this CPU, which takes a minute or two."""
    from export.aoti.build import AotConfig, compile_artifact

    config = AotConfig(SIZES, (2,), "fp32", device="cpu")
    return once("aoti/tiny", lambda out: compile_artifact(checkpoint, out, config))


@pytest.fixture(scope="module")
def deployed(packages: Path, once: Once) -> Path:
    return once("deployments/aoti", lambda out: write_repository(packages, out, Limits(), Tuning()))


def test_a_deployment_has_the_packages_of_each_part_and_what_they_were_compiled_for(
    deployed: Path, packages: Path
) -> None:
    made = verify(deployed, kinds=("deployment",))
    assert made.parts["transformer"].graph == "denoiser/1/transformer/packages.json"
    version = deployed / "vae_decoder" / "1"
    assert {path.name for path in version.iterdir()} == {"model.py", "settings.json", "aoti.json", "vae_decoder"}
    assert (version / "vae_decoder" / "weights.safetensors").samefile(packages / "vae_decoder" / "weights.safetensors")
    options = read_manifest(packages).options
    assert read_record(version / "aoti.json") == {key: options[key] for key in ("device", "gpu", "processor", "torch")}
    settings = Settings.read(version)
    assert (settings.runtime, settings.gpu, settings.limits.sizes) == ("aoti", False, SIZES)
    assert type(open_model(version, "vae_decoder", settings)).__name__ == "AotiEngine"
    assert (deployed / ANSWER).is_file()


def test_packages_for_a_gpu_are_python_models_on_the_gpu(deployed: Path) -> None:
    settings = replace(Settings.read(deployed / "denoiser" / "1"), gpu=True)
    for name in ("text_encoder", "denoiser", "vae_decoder"):
        parsed = text_format.Parse(configs(settings)[name], proto.ModelConfig())
        assert parsed.backend == "python"
        assert parsed.instance_group[0].kind == proto.ModelInstanceGroup.KIND_GPU


def index(folder: Path, part: str, sizes: list[dict[str, int]]) -> None:
    (folder / part).mkdir()
    text = json.dumps({"packages": [{"file": "a.pt2", "sizes": each} for each in sizes]})
    (folder / part / "packages.json").write_text(text)


def test_only_compiled_sizes_within_the_limits_are_served(packages: Path, tmp_path: Path) -> None:
    manifest = read_manifest(packages)
    assert compiled_sizes(packages, manifest) == SIZES
    index(tmp_path, "transformer", [{"batch": 1, "image_tokens": 16}, {"batch": 1, "image_tokens": 24}])
    places = [{"batch": 1, "latent_height": h, "latent_width": w} for h, w in ((4, 4), (4, 6), (8, 8))]
    index(tmp_path, "vae_decoder", places)
    assert compiled_sizes(tmp_path, manifest) == ((64, 64), (96, 64)), "no transformer for 128 x 128"
    assert limits_of(tmp_path, manifest, Limits(max_side=64)).sizes == ((64, 64),)
    with pytest.raises(UsageError, match="no image size that was compiled is within the limits; compiled: 64x64"):
        write_repository(packages, tmp_path / "deploy", Limits(min_side=512), Tuning())


def test_a_broken_index_or_record_is_named(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="aoti.json: cannot be read .*write the deployment again"):
        read_record(tmp_path / "aoti.json")
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "packages.json").write_text(json.dumps({"packages": [{}]}))
    with pytest.raises(ArtifactError, match="packages.json: cannot be read .*compile the artifact again"):
        compiled_sizes(tmp_path, read_manifest(packages))


@pytest.mark.server
def test_the_server_generates_the_images_of_the_packages_and_nearly_those_of_onnx_runtime(
    deployed: Path, packages: Path, checkpoint: Path, once: Once, tmp_path: Path
) -> None:
    exported = once("artifacts/aoti", lambda out: export(checkpoint, out, ExportConfig()))
    local, onnx = LocalPipeline(packages), LocalPipeline(exported)
    asked = [
        {"prompt": "a red circle on a white background", "seed": 7, "width": 64, "height": 64, "steps": 4},
        {"prompt": "two blue squares", "seed": 8, "steps": 2, "num_images": 3},
    ]
    with Server(deployed, log=tmp_path / "triton.log") as server, Client(server.url) as client:
        for fields in asked:
            served = np.stack([decode(image) for image in client.generate(fields, timeout=120).images])
            assert np.array_equal(served, local.generate(fields).pixels)
            off = np.abs(served.astype(int) - onnx.generate(fields).pixels.astype(int))
            assert off.max() <= 2, f"max {off.max()}, mean {off.mean():.3f} of 255"
        with pytest.raises(RequestError, match="64 x 96 was not compiled; this server generates 64 x 64"):
            client.generate({"prompt": "a boat", "width": 64, "height": 96}, timeout=60)
