"""The sample's adapters, merged at export, match torch with their deltas added by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from export.artifact import ExportConfig, export
from export.lora.terms import Lora
from kit.checkpoint import resolve
from tests.export.bfl import State
from tests.export.test_single_file import feeds_of, reference, run, session

ADAPTERS = sorted((Path(__file__).parents[2] / "kit" / "sample" / "loras").glob("*.safetensors"))
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the sample with an fp32 transformer, so that a merged weight is not rounded to bf16."""
    folder = tmp_path_factory.mktemp("sample") / "checkpoint"
    shutil.copytree(resolve("sample"), folder)
    save_file({name: tensor.float() for name, tensor in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    return folder


def delta(file: Path) -> State:
    """Compute alpha / rank * B A of every module, with alpha from diffusers' header."""
    with safe_open(file, "pt") as stored:
        settings = json.loads(stored.metadata()["lora_adapter_metadata"])
        tensors = {name: stored.get_tensor(name).float() for name in stored.keys()}  # noqa: SIM118  # no mapping
    assert not settings["transformer.alpha_pattern"]
    assert not settings["transformer.rank_pattern"]
    made: State = {}
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix("transformer.").removesuffix(".lora_A.weight")
            b = tensors[f"transformer.{module}.lora_B.weight"]
            made[f"{module}.weight"] = settings["transformer.lora_alpha"] / settings["transformer.r"] * b @ a
    return made


def test_there_are_two_that_change_something() -> None:
    assert len(ADAPTERS) >= 2
    assert all(tensor.abs().max() > 0 for file in ADAPTERS for tensor in delta(file).values())


@pytest.mark.parametrize(
    "weights", [(1.0, 0.0), (0.0, 0.8), (0.7, -0.4)], ids=["the first", "the second", "both with weights"]
)
def test_the_graph_equals_torch_with_the_deltas_added(
    checkpoint: Path, tmp_path: Path, weights: tuple[float, ...]
) -> None:
    loras = tuple(Lora(file, weight) for file, weight in zip(ADAPTERS, weights, strict=False) if weight)
    made = export(checkpoint, tmp_path / "out", ExportConfig(("transformer",), loras=loras))
    plain = load_file(checkpoint / WEIGHTS)
    expected = dict(plain)
    for lora in loras:
        for name, change in delta(lora.file).items():
            expected[name] = expected[name] + lora.weight * change
    changed = [name for name in plain if not torch.equal(plain[name], expected[name])]
    assert made.parts[0].derived_bytes == sum(plain[name].numel() * 4 for name in changed)
    runner = session(tmp_path / "out", "transformer")
    feeds = feeds_of(runner)
    found, wanted = run(runner, feeds), reference(checkpoint, expected, feeds)
    scale = np.abs(wanted).max()
    assert np.abs(found - wanted).max() <= TOLERANCE * scale
    assert np.abs(wanted - reference(checkpoint, plain, feeds)).max() > 100 * TOLERANCE * scale


def test_on_the_sample_itself_a_merged_weight_is_rounded_to_bf16_once(tmp_path: Path) -> None:
    loras = tuple(Lora(file, 0.5) for file in ADAPTERS[:2])
    export(resolve("sample"), tmp_path / "out", ExportConfig(("transformer",), loras=loras))
    plain = load_file(resolve("sample") / WEIGHTS)
    derived = load_file(tmp_path / "out" / "transformer" / "derived.safetensors")
    deltas = [delta(lora.file) for lora in loras]
    assert derived.keys() == {name for made in deltas for name in made}
    for name, tensor in derived.items():
        exact = plain[name].double() + sum(0.5 * made[name].double() for made in deltas if name in made)
        assert tensor.dtype == torch.bfloat16
        step = torch.finfo(torch.bfloat16).eps * exact.abs()  # at least the distance to the next representable number
        assert ((tensor.double() - exact).abs() <= 0.5 * step + 1e-6).all(), name
