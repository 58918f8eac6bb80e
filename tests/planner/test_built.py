"""Plans for an engine that was built: its own bytes and roofline in place of formulas."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.__main__ import main
from kit.artifact import Manifest, PartRecord, write_manifest
from kit.errors import ArtifactError, UsageError
from kit.gpus import GB
from kit.ports import ports
from kit.recipes import RECIPES
from kit.variants import VARIANTS
from planner.built import read_built
from planner.memory import Shape, activation_bytes, weight_bytes
from tests.planner.test_command import answer

KLEIN = VARIANTS["klein-4b"]
ACCOUNT = {
    "scratch": 445_244_416,
    "scratch_of_all_profiles": 1_613_942_784,
    "roofline": {"gpu": "l4", "seconds": 0.9},
    "sizes": {"batch": 1, "image_tokens": 4096},
}
PARTS: Any = ("transformer", "vae_decoder")


def engine(folder: Path, kind: Any = "engine", weights: str = "plan", **account: Any) -> Path:
    """Write the manifest of an engine of klein-4b for an L4; its plans are placeholders."""
    told = {"transformer": {**ACCOUNT, **account}, "vae_decoder": {"scratch": 7 * GB}}
    plans = {part: [{"file": f"{part}/model.plan", "bytes": 5 * GB, "layers": told[part]}] for part in PARTS}
    parts = {part: PartRecord(f"{part}/model.plan", ports(part, KLEIN, "bf16")) for part in PARTS}
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        (folder / part / "model.plan").write_bytes(b"plan")
    write_manifest(
        folder, Manifest(kind, KLEIN, "bf16", "fp8", {"gpu": "l4", "weights": weights, "plans": plans}, {}, parts)
    )
    return folder


def test_an_engine_gives_its_variant_gpu_recipe_memory_and_roofline(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, "plan", "--engine", str(engine(tmp_path / "klein-l4")))
    assert (found["variant"], found["gpu"], found["engine"]) == ("klein-4b", "l4", "klein-l4")
    assert found["plan"] == "fp8, text encoder on the GPU"
    weights = found["memory"]["weights"]
    assert weights["transformer"] == weights["vae_decoder"] == 5 * GB
    assert weights["text_encoder"] == weight_bytes("text_encoder", KLEIN, RECIPES["fp8"]), "the engine has none"
    assert 7 * GB in found["memory"].values(), "the decoder's activations are the largest"
    assert found["seconds"]["step"][0] == 0.9, "no estimate is faster than the roofline of the layers"
    assert main(["plan", "--engine", str(tmp_path / "klein-l4")]) == 0
    said = capsys.readouterr().out
    assert "engine klein-l4: sizes of its plans, and activation memory at the largest of their profiles" in said
    assert re.search(r"one step, s \(0\.90* by the engine's layers\)", said)


def test_what_the_compiler_did_not_say_is_estimated(tmp_path: Path) -> None:
    built = read_built(engine(tmp_path / "e", weights="inputs", scratch=None, scratch_of_all_profiles=None))
    estimate = activation_bytes("transformer", KLEIN, RECIPES["fp8"], Shape(1024, 1024))
    assert built.activations("transformer", estimate) == estimate
    assert built.activations("vae_decoder", estimate) == 7 * GB
    assert built.stored("transformer", 4 * GB) == 9 * GB, "weights that are inputs lie beside the plans"
    assert built.stored("text_encoder", 4 * GB) == 4 * GB
    assert built.roofline("transformer", {"batch": 2, "image_tokens": 4096}) is None
    assert replace(built, parts={}).roofline("transformer", ACCOUNT["sizes"]) is None  # type: ignore[arg-type]


def test_other_artifacts_and_broken_accounts_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"an artifact of kind 'onnx'; `export engine` makes engines"):
        read_built(engine(tmp_path / "onnx", kind="onnx"))
    broken = engine(tmp_path / "broken")
    content = json.loads((broken / "manifest.json").read_text())
    del content["options"]["plans"]["transformer"][0]["bytes"]
    (broken / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"broken: the account of its plans is invalid \(KeyError\('bytes'\)\)"):
        read_built(broken)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "dev"], "--variant dev: .* was built for klein-4b; leave --variant out"),
        (["--gpu", "a10g"], "--gpu a10g: .* was built for l4; leave --gpu out"),
        (["--recipe", "int8"], "--recipe int8: .* was built for fp8; leave --recipe out"),
    ],
)
def test_options_that_contradict_the_engine_are_rejected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["plan", "--engine", str(engine(tmp_path / "e")), *words]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_without_an_engine_variant_and_gpu_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu", "l4"]) == 2
    assert "--variant is required without --engine" in capsys.readouterr().err
    assert main(["plan", "--variant", "klein-4b"]) == 2
    assert "--gpu is required without --engine" in capsys.readouterr().err
