"""The command line of export: its output, exit codes and errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from export import __main__ as command
from export import artifact
from kit import checkpoint as kit_checkpoint
from kit import tiny
from kit.checkpoint import resolve
from kit.errors import CheckpointError, UsageError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("command") / "checkpoint", tiny.Tiny(text_tokens=64))


def test_json_is_the_last_line_and_tells_what_was_done(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["onnx", str(checkpoint), "--out", str(tmp_path / "out"), "--parts", "vae_encoder", "--json"]
    assert command.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    facts = json.loads(lines[-1])
    assert lines[0].startswith("vae_encoder")
    assert "MB of weights linked" in lines[0]
    assert not facts["up_to_date"]
    assert facts["variant"] == "klein-custom"
    assert [part["part"] for part in facts["parts"]] == ["vae_encoder"]
    assert facts["parts"][0]["nodes"] > 100
    assert 10_000 < facts["graph_bytes"] < 200_000
    assert facts["linked_bytes"] > 1_000_000
    assert facts["copied_bytes"] == 0
    assert facts["peak_rss_bytes"] > 1_000_000
    assert command.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("klein-custom, up to date")
    assert json.loads(lines[-1])["up_to_date"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["onnx", "nowhere", "--out", "x"],
            "nowhere does not exist; give a folder in diffusers layout, a hub id, 'sample' or",
        ),
        (["onnx", "org/model", "--out", "x"], "'org/model' cannot be downloaded from the hub"),
        (
            ["onnx", "sample", "--out", "x", "--parts", "vae"],
            "unknown part 'vae'; there are: text_encoder, transformer",
        ),
        (["onnx", "sample", "--out", "x", "--parts", ","], "--parts: no part is named"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_ctrl_c_is_exit_code_130(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(artifact, "_export_part", interrupt)
    assert command.main(["onnx", str(checkpoint), "--out", str(tmp_path / "out")]) == 130
    assert "interrupted; unfinished output was removed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_file_alone_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "flux2.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file; a checkpoint is a folder in diffusers layout"):
        resolve(str(tmp_path / "flux2.safetensors"))


def test_a_folder_of_another_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        resolve(str(tmp_path))


def test_a_missing_path_below_an_existing_folder_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").mkdir()
    with pytest.raises(UsageError, match="build/klein does not exist"):
        resolve("build/klein")


def test_sample_is_the_shipped_checkpoint_or_a_tiny_one_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kit_checkpoint, "SHIPPED", tmp_path / "shipped")
    made = resolve("sample")
    assert made.parent == tmp_path / "cache" / "flux2-deploy"
    stamp = (made / "model_index.json").stat().st_mtime_ns
    assert resolve("sample") == made
    assert (made / "model_index.json").stat().st_mtime_ns == stamp
    assert [p.name for p in made.parent.iterdir()] == [made.name]  # no temporary folder is left
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "model_index.json").write_text("{}")
    assert resolve("sample") == tmp_path / "shipped"
