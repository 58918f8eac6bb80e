"""AOTInductor packages: compiled from a tiny checkpoint and run by the denoiser; rejected on other machines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.aoti.build import AotConfig, buckets, compile_artifact, parse_sizes
from export.aoti.command import add_arguments, run
from export.artifact import ExportConfig, export
from kit import tiny
from kit.artifact import read_manifest, verify, write_manifest
from kit.dtypes import to_array, to_tensor
from kit.engine import Array, Engine
from kit.errors import ArtifactError, EngineError, UsageError
from pipeline.denoise import Denoiser
from pipeline.live_request import LiveRequest
from pipeline.request import Limits, check
from runtimes.aoti.engine import open_engine
from runtimes.ort.engine import OrtEngine
from tests.runtimes.conformance import assert_conforms

TINY = tiny.Tiny(double_blocks=1, single_blocks=1, heads=1, text_tokens=8)
SIZES = ((48, 80), (80, 48), (64, 64))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("aoti") / "checkpoint", TINY)


@pytest.fixture(scope="module")
def artifact(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compile one package for all tests of this module; compiling takes a minute."""
    out = tmp_path_factory.mktemp("aoti") / "artifact"
    made = compile_artifact(checkpoint, out, AotConfig(((64, 64),), (2,), "fp32", device="cpu", parts=("transformer",)))
    assert [dict(p.sizes) for p in made] == [{"batch": 2, "image_tokens": 16}]
    return out


def generate(engine: Engine, checkpoint: Path, jobs: int = 3) -> list[LiveRequest]:
    """Denoise requests of one size and different step counts together, more rows than a package has."""
    variant = read_manifest(checkpoint).variant
    denoiser = Denoiser(variant, "fp32", engine)
    text = np.random.default_rng(1).standard_normal((jobs, variant.text_tokens, variant.transformer.joint_dim))
    live = [
        denoiser.admit(
            check({"prompt": "a cat", "seed": n, "width": 64, "height": 64, "steps": n + 1}, variant, Limits()),
            text[n].astype(np.float32),
        )
        for n in range(jobs)
    ]
    while going := [job for job in live if not job.done]:
        denoiser.step(going)
        assert [job.error for job in going] == [None] * len(going)
    return live


def test_packages_give_the_same_latents_as_onnx_runtime(artifact: Path, checkpoint: Path, tmp_path: Path) -> None:
    export(checkpoint, tmp_path / "onnx", ExportConfig(parts=("transformer",)))
    record = read_manifest(tmp_path / "onnx").part("transformer")
    wanted = generate(OrtEngine(tmp_path / "onnx" / record.graph, record.ports), artifact)
    found = generate(open_engine(artifact, "transformer"), artifact)
    for job, reference in zip(found, wanted, strict=True):
        difference = np.abs(job.latents - reference.latents)
        scale = np.abs(reference.latents).max()
        assert difference.max() <= 1e-4 * scale, f"max {difference.max():.3g}, mean {difference.mean():.3g}"


def test_packages_keep_the_engine_protocol(artifact: Path) -> None:
    engine = open_engine(artifact, "transformer")

    def make(seed: int) -> dict[str, Array]:
        rng = np.random.default_rng(seed)
        made: dict[str, Array] = {}
        for port in engine.ports.inputs:
            shape = port.shape({"batch": 3, "image_tokens": 16})  # more rows than the package has
            made[port.name] = rng.integers(0, 4, shape) if port.dtype == "i64" else rng.random(shape).astype(np.float32)
        return made

    assert_conforms(engine, make)


def test_a_server_needs_neither_diffusers_nor_a_compiler(artifact: Path) -> None:
    code = f"""
import sys
for name in ("diffusers", "onnxruntime", "onnx_ir", "transformers", "torchao"):
    sys.modules[name] = None
from pathlib import Path
from kit.artifact import read_manifest
from runtimes.open import open_parts
import subprocess
subprocess.Popen = None  # a compiler would be a process
folder = Path({str(artifact)!r})
engine = open_parts(folder, read_manifest(folder), ("transformer",))["transformer"]
print(type(engine).__name__, len(engine.buckets))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout.strip() == "AotiEngine 1", done.stderr


def test_an_image_of_another_size_is_rejected_with_the_compiled_sizes(artifact: Path) -> None:
    engine = open_engine(artifact, "transformer")
    types: dict[str, Any] = {"fp32": np.float32, "i64": np.int64}
    sizes = {"batch": 1, "image_tokens": 24}
    inputs = {port.name: np.zeros(port.shape(sizes), types[port.dtype]) for port in engine.ports.inputs}
    with pytest.raises(EngineError, match="compiled for image_tokens 24; there are: image_tokens 16. Compile"):
        engine.run(inputs)
    del inputs["timestep"]
    with pytest.raises(EngineError, match="input timestep is missing"):
        engine.run(inputs)


def changed(artifact: Path, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """Copy an artifact's manifest with other options; files are links."""
    import shutil

    shutil.copytree(artifact, folder, symlinks=True)
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, options=change(dict(manifest.options))))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"torch": "2.12.1"}, r"was compiled with torch 2\.12\.1; this environment has .*: compile it again"),
        (
            {"processor": "CPU with VSX"},
            "was compiled for CPU with VSX; this machine has .*: compile it again",
        ),
        (
            {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3"},
            "was compiled for NVIDIA H100 80GB HBM3; torch finds no CUDA GPU here",
        ),
    ],
    ids=["torch", "processor", "device"],
)
def test_an_artifact_for_another_machine_is_rejected(
    artifact: Path, tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = changed(artifact, tmp_path / "other", lambda options: options | change)
    with pytest.raises(ArtifactError, match=message):
        open_engine(folder, "transformer")


def test_cuda_graphs_on_a_cpu_are_rejected(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="compiled for a CPU, which has no CUDA graphs; use launch 'calls'"):
        open_engine(artifact, "transformer", "graphs")


def test_a_damaged_package_and_a_missing_part_are_rejected(artifact: Path, tmp_path: Path) -> None:
    folder = changed(artifact, tmp_path / "damaged", lambda options: options)
    with pytest.raises(ArtifactError, match="the artifact has no vae_decoder; it has: transformer"):
        open_engine(folder, "vae_decoder")
    (package,) = folder.rglob("*.pt2")
    package.write_bytes(package.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match=r"\.pt2: its digest differs from the manifest"):
        open_engine(folder, "transformer")


def test_a_weight_missing_from_the_file_is_named(artifact: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = changed(artifact, tmp_path / "poor", lambda options: options)
    path = folder / "transformer" / "weights.safetensors"
    weights = load_file(path)
    del weights["model.proj_out.weight"]
    path.unlink()
    save_file(weights, path)
    write_manifest(folder, read_manifest(folder))
    with pytest.raises(
        ArtifactError, match="needs the weight 'model.proj_out.weight', which the weight file does not contain"
    ):
        open_engine(folder, "transformer")


def test_a_manifest_records_what_was_compiled_for_which_machine(artifact: Path) -> None:
    manifest = verify(artifact, kinds=("aoti",))
    assert manifest.options == {
        "device": "cpu",
        "gpu": None,
        "processor": f"CPU with {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "fused": "qkv",
        "attention": "sdpa",
    }
    assert (manifest.recipe, manifest.compute, list(manifest.parts)) == ("fp32", "fp32", ["transformer"])
    index = json.loads((artifact / manifest.part("transformer").graph).read_text())
    assert index == {"packages": [{"file": "batch2-image_tokens16.pt2", "sizes": {"batch": 2, "image_tokens": 16}}]}
    assert "tokenizer/tokenizer.json" in manifest.files


def test_images_of_equal_area_share_the_transformers_packages() -> None:
    from kit.variants import VARIANTS

    config = AotConfig(SIZES, (2, 1, 2))
    klein = VARIANTS["klein-4b"]
    transformer = buckets("transformer", klein, config)
    assert [(b["image_tokens"], b["batch"]) for b in transformer] == [(15, 1), (15, 2), (16, 1), (16, 2)]
    assert len(buckets("vae_decoder", klein, config)) == 6
    assert buckets("text_encoder", klein, config) == [{"batch": 1}, {"batch": 2}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "1024"], "--sizes 1024: expected comma-separated WIDTHxHEIGHT"),
        (["--sizes", "100x64", "--device", "cpu"], "--sizes 100x64: 100 is not a multiple of 16; nearest: 96 or 112"),
        (["--batches", "two"], "--batches two: expected comma-separated numbers"),
        (["--batches", "0", "--device", "cpu"], "--batches 0: every batch must be 1 or more"),
        (["--parts", "vae_encoder"], "--parts vae_encoder: cannot be compiled; there are: text_encoder, transformer"),
        (["--device", "cuda"], "--device cuda: torch finds no CUDA GPU here; use --device cpu"),
    ],
)
def test_what_cannot_be_compiled_is_rejected_before_anything_is_loaded(
    checkpoint: Path, tmp_path: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(UsageError, match=message):
        run(parser.parse_args([str(checkpoint), "--out", str(tmp_path / "out"), *options]))
    assert not (tmp_path / "out").exists()


def test_sizes_are_read_with_blanks_and_capitals() -> None:
    assert parse_sizes("1024x1024, 512X768") == ((1024, 1024), (512, 768))


def test_bf16_arrays_go_through_torch_and_back_unchanged() -> None:
    import ml_dtypes

    array = np.array([[1.5, -2.25], [3e38, 1e-30]], np.float32).astype(ml_dtypes.bfloat16)
    tensor = to_tensor(array)
    assert tensor.dtype == torch.bfloat16
    back = to_array(tensor)
    assert back.dtype == array.dtype
    assert np.array_equal(back.view(np.int16), array.view(np.int16))
