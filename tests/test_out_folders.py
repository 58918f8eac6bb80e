"""Every command that writes a folder refuses the same --out, by the rule of kit.outputs, and leaves its input alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kit.artifact import Manifest, verify, write_manifest
from kit.commands import flux2
from kit.outputs import AOTI, DEPLOYMENT, ENGINE, GATE, ONNX, QUANTIZED, SEARCH
from kit.variants import VARIANTS

# what is written -> the words before --out; IN is an ONNX artifact, CHECKPOINT a folder in diffusers layout
COMMANDS = {
    ONNX: ("export", "onnx", "CHECKPOINT"),
    AOTI: ("export", "aoti", "CHECKPOINT", "--device", "cpu"),
    ENGINE: ("export", "engine", "IN", "--gpu", "l4"),
    QUANTIZED: ("quantize", "apply", "IN", "--recipe", "int8-weights"),
    SEARCH: ("quantize", "search", "IN", "--checkpoint", "sample", "--recipe", "int8"),
    GATE: ("quantize", "gate", "IN", "--reference", "OTHER"),
    DEPLOYMENT: ("serve", "repository", "IN"),
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("IN", "OTHER"):
        (tmp_path / "build" / name).mkdir(parents=True)
        (tmp_path / "build" / name / "graph.onnx").write_bytes(b"graph")
        write_manifest(tmp_path / "build" / name, Manifest("onnx", VARIANTS["klein-4b"], "fp32", "fp32", {}, {}))
    (tmp_path / "build" / "CHECKPOINT").mkdir()
    (tmp_path / "build" / "CHECKPOINT" / "model_index.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("SOURCE", "(is the input|holds an ONNX artifact|exists and)"),
        ("SOURCE/inside", "lies in the input"),
        ("build", "(contains the input|exists and)"),
        ("mine", "exists and (is not an artifact|has no)"),
        ("mine/thesis.txt", "is a file, and this command writes a folder"),
        (".", "is the current folder"),
    ],
)
@pytest.mark.parametrize("makes", COMMANDS, ids=lambda output: str(output.title))
def test_what_would_lose_data_is_refused(
    makes: object, out: str, said: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"build/{word}" if word.isupper() else word for word in COMMANDS[makes]]  # type: ignore[index]
    before = sorted(here.rglob("*"))
    out = out.replace("SOURCE", words[2])
    assert flux2([*words, "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: --out {out} ")
    assert re.search(said, error), error
    assert sorted(here.rglob("*")) == before
    verify(here / "build" / "IN")


def test_an_onnx_artifact_is_not_replaced_by_a_deployment_of_another(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flux2(["serve", "repository", "build/IN", "--out", "build/OTHER"]) == 2
    said = "--out build/OTHER holds an ONNX artifact, and this command writes a deployment; choose another --out"
    assert capsys.readouterr().err == f"error: {said}\n"
    assert verify(here / "build" / "OTHER").kind == "onnx"
