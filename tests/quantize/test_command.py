"""The command line of quantize: its output, its errors, and what an interruption leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kit import tiny
from kit.artifact import verify
from kit.errors import UsageError
from quantize import __main__ as command
from quantize import conversions
from quantize.calibration import record

# Prints a line when weights are being written, and then waits to be killed.
SLOW = """
import sys, time
from quantize import conversions

def convert(jobs, path, progress):
    path.write_bytes(b"half of it")
    print("writing", flush=True)
    time.sleep(300)

conversions.convert = convert
from quantize import __main__ as command
command.main(sys.argv[1:])
"""


def words(artifact: Path, out: Path, *more: str | Path) -> list[str]:
    return ["apply", *(str(word) for word in (artifact, "--out", out, *more))]


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return facts


def test_apply_prints_its_work_and_is_up_to_date_the_second_time(
    sample_artifact: Path, sample_record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words(sample_artifact, tmp_path / "out", "--recipe", "int8", "--calibration", sample_record, "--json")
    assert command.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("text_encoder")
    assert "layers: 162 int8, 27 int8-weights" in lines[0]
    assert "inputs smoothed" in lines[0]
    assert lines[1].startswith("transformer")
    facts = json.loads(lines[-1])
    assert (facts["recipe"], facts["up_to_date"], facts["out"]) == ("int8", False, str(tmp_path / "out"))
    parts = {part["part"]: part for part in facts["parts"]}
    assert parts["transformer"]["schemes"]["int8"] == 32
    assert parts["transformer"]["written_bytes"] < 0.65 * parts["transformer"]["source_bytes"]
    assert facts["peak_rss_bytes"] > 1_000_000
    assert verify(tmp_path / "out").kind == "quantized"
    stamp = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    assert command.main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("out: recipe int8, up to date")
    assert json.loads(lines[-1])["up_to_date"]
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--recipe", "fp5"], "unknown recipe 'fp5'; there are: fp32, bf16, fp8"),
        (["--recipe", "int8"], "recipe int8 quantizes activations, which needs a calibration record"),
        (["--recipe", "int8", "--calibration", "none.json"], "calibration record none.json: No such file or directory"),
        (["--recipe", "int8-weights", "--gpu", "tpu"], "unknown gpu 'tpu'; there are: l4"),
        (["--recipe", "none.json"], "recipe none.json: No such file or directory"),
    ],
)
def test_wrong_use_of_apply_is_one_line_and_exit_code_2(
    sample_artifact: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*words(sample_artifact, tmp_path / "out"), *more, "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert json.loads(captured.out)["exit_code"] == 2
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_an_artifact_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert command.main(words(tmp_path / "empty", tmp_path / "out", "--recipe", "int8-weights")) == 2
    assert "has no manifest.json, so it is not a finished artifact" in capsys.readouterr().err
    assert command.main(words(tmp_path / "none", tmp_path / "out", "--recipe", "int8-weights")) == 2
    assert "does not exist" in capsys.readouterr().err


def test_a_damaged_artifact_is_exit_code_1(
    sample_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(sample_artifact, tmp_path / "damaged")
    (damaged / "transformer" / "model.onnx").write_bytes(b"")
    assert command.main(words(damaged, tmp_path / "out", "--recipe", "int8-weights")) == 1
    assert "model.onnx: has 0 bytes, the manifest says" in capsys.readouterr().err


def test_ctrl_c_is_exit_code_130_and_leaves_nothing(
    sample_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversions, "read_rows", interrupted)
    assert command.main(words(sample_artifact, tmp_path / "out", "--recipe", "int8-weights")) == 130
    assert "interrupted; unfinished output was removed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_nothing_that_verifies_and_the_next_one_succeeds(
    sample_artifact: Path, tmp_path: Path
) -> None:
    argv = words(sample_artifact, tmp_path / "out", "--recipe", "int8-weights")
    with subprocess.Popen([sys.executable, "-c", SLOW, *argv], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "writing" in process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.unfinished-")
    with pytest.raises(UsageError, match=r"has no manifest\.json, so it is not a finished artifact"):
        verify(left)
    assert command.main(argv) == 0
    assert verify(tmp_path / "out").recipe == "int8-weights"


def test_calibrate_and_merge_write_records_that_apply_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a red fox\n")
    checkpoint = tiny.save(tmp_path / "klein", tiny.Tiny(text_tokens=64))
    for seeds in (1, 2):
        argv = ["calibrate", str(checkpoint), "--prompts", str(tmp_path / "p.txt"), "--steps", "1", "--width", "64"]
        argv += ["--height", "64", "--parts", "transformer", "--seeds", str(seeds), "--json"]
        assert command.main([*argv, "--out", str(tmp_path / f"{seeds}.json")]) == 0
        told = capsys.readouterr()
        assert f"warning: only {seeds} images: activations larger than" in told.err
        facts = json.loads(told.out.splitlines()[-1])
        assert facts["layers"] == {"transformer": 2 * 12 + 3 * 2}
        assert facts["digest"] == record.read(tmp_path / f"{seeds}.json").digest
    records = [str(tmp_path / f"{seeds}.json") for seeds in (1, 2)]
    assert command.main(["merge", *records, "--out", str(tmp_path / "both.json"), "--json"]) == 0
    assert last_line(capsys)["images"] == 3
    assert len(record.read(tmp_path / "both.json").runs) == 2
    assert command.main(["merge", records[0], records[0], "--out", str(tmp_path / "twice.json")]) == 2
    assert "1.json contain the same run, whose images would count twice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["calibrate", "nowhere", "--out", "x.json"], "nowhere does not exist; give a folder in diffusers layout"),
        (["calibrate", "sample", "--out", "x.json", "--seeds", "0"], "--seeds 0 is not positive"),
        (["calibrate", "sample", "--out", "x.json", "--batch", "-1"], "--batch -1 is not positive"),
        (["calibrate", "sample", "--out", "x.json", "--prompts", "none.txt"], "--prompts none.txt: no such file"),
        (["calibrate", "sample", "--out", "."], "--out . is a folder; give a file"),
        (
            ["calibrate", "sample", "--out", "p.txt", "--prompts", "p.txt"],
            "--out p.txt is a file that this command reads",
        ),
        (["calibrate", "sample", "--out", "p.txt"], "--out p.txt exists and is not a calibration record; choose"),
        (["merge", "p.txt", "--out", "p.txt"], "--out p.txt is a file that this command reads"),
        (["merge", "a.json", "--out", "p.txt"], "--out p.txt exists and is not a calibration record; choose"),
        (["merge", "none.json", "--out", "x.json"], "calibration record none.json: No such file or directory"),
    ],
)
def test_wrong_use_of_calibrate_and_merge_is_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.txt").write_text("a red fox\n")
    assert command.main(argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {message}")
    assert captured.err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["p.txt"]
    assert (tmp_path / "p.txt").read_text() == "a red fox\n"
