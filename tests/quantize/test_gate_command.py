"""`quantize gate` on the command line: kept and broken contracts, the report, errors, interruption."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kit.artifact import CERTIFICATE
from kit.errors import CheckFailed, RequestError, UsageError
from kit.safetensors_file import header_digest
from quantize import prompt_set
from quantize.gate import contract, similarity
from quantize.gate.admission import admit
from quantize.gate.command import add_arguments, choose, run

LOOSE = """
format = 1
least_prompts = 1
[bounds.flip]
at_most = 0.9
[bounds.judge_change]
at_least = -1
when = "measured"
"""


@pytest.fixture(autouse=True)
def no_text_recognition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the metrics the same on machines with and without Tesseract."""
    monkeypatch.setenv("PATH", "")


@pytest.fixture(scope="session")
def coarse_artifact(sample_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Truncate the mantissas of the sample's transformer from seven bits to one."""
    folder = tmp_path_factory.mktemp("artifacts") / "coarse"
    shutil.copytree(sample_artifact, folder)
    (weights,) = (folder / "transformer").glob("*.safetensors")
    before = header_digest(weights)
    content = bytearray(weights.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    values = np.frombuffer(content, "<u2", offset=start)  # bfloat16: sign, 8 bits of exponent, 7 of mantissa
    values &= 0xFFC0
    weights.unlink()  # it is a hard link to the checkpoint's file, which must not change
    weights.write_bytes(content)
    assert header_digest(weights) == before
    return folder


def gate(*words: str | Path | int) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(word) for word in words]))


def loose(folder: Path) -> Path:
    path = folder / "loose.toml"
    path.write_text(LOOSE)
    return path


def test_prompts_used_for_calibration_are_left_out_or_give_a_warning(
    quantized_of: Callable[[str], Path], sample_artifact: Path
) -> None:
    admitted = admit(quantized_of("int8"), sample_artifact)
    manifest = admitted.candidate
    assert manifest is not None
    bounds = contract.of_recipe("int8")
    marks = manifest.source["calibration_prompts"]
    assert set(marks) == {prompt.mark for prompt in prompt_set.load("sample:64:7").prompts}
    prompts, warnings = choose("sample:64:7", admitted, bounds)
    assert len(prompts.prompts) == 64
    assert "calibrated on 64 of these 64 prompts" in warnings[0]

    def seen(count: int) -> Any:
        known = [prompt.mark for prompt in prompt_set.load(f"sample:{count}").prompts]
        source = {**manifest.source, "calibration_prompts": known}
        return replace(admitted, candidate=replace(manifest, source=source))

    prompts, warnings = choose(None, seen(50), bounds)
    assert (prompts.spec, len(prompts.prompts), warnings) == ("sample:200 without 50", 150, ())
    prompts, warnings = choose(None, seen(190), bounds)  # the ten that remain are too few
    assert len(prompts.prompts) == 200
    assert "calibrated on 190 of these 200 prompts" in warnings[0]
    assert choose("sample:30", seen(1), bounds)[1]


def test_an_artifact_keeps_the_contract_against_itself(
    sample_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = tmp_path / "strict.toml"
    strict.write_text("format = 1\n[bounds.ssim]\nat_least = 1\n[bounds.flip]\nat_most = 0\n")
    words = (sample_artifact, "--reference", sample_artifact, "--contract", strict)
    facts = gate(*words, "--prompts", "sample:4", "--steps", 2)
    assert facts["kept"]
    assert facts["metrics"]["ssim"]["low"] == 1
    assert facts["metrics"]["flip"]["high"] == 0
    assert facts["canvas"] == {"width": 128, "height": 128, "steps": 2, "guidance": 1.0}
    assert facts["not_measured"]["clip_change"] == "no CLIP model was given with --clip DIR"
    assert len(facts["latent_cosine_by_step"]) == 2
    assert facts["out"] is None
    told = capsys.readouterr()
    assert "# sample against sample: contract kept" in told.out
    assert "warning: candidate and reference are the same artifact" in told.err


def test_a_coarse_artifact_breaks_the_contract_and_the_report_shows_by_how_much(
    sample_artifact: Path, coarse_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    words = (coarse_artifact, "--reference", sample_artifact, "--prompts", "sample:6", "--seeds", 2)
    with pytest.raises(CheckFailed, match="contract fp32 broken: 6 prompts are used") as broken:
        gate(*words, "--out", out, "--images", 3)
    assert re.search(r"ssim at least 0\.995: found 0\.\d+, between 0\.\d+ and 0\.\d+ with 95 %", str(broken.value))
    assert str(out / "report.json") in str(broken.value)
    report = json.loads((out / "report.json").read_text())
    assert not report["kept"]
    assert len(report["pairs"]) == 12
    ssim = report["metrics"]["ssim"]
    assert (ssim["prompts"], ssim["drawings"]) == (6, 12)
    assert ssim["mean"] == pytest.approx(np.mean([pair["ssim"] for pair in report["pairs"]]), abs=1e-5)
    assert ssim["worst"]["value"] == min(pair["ssim"] for pair in report["pairs"])
    cosines = [step["mean"] for step in report["latent_cosine_by_step"]]
    assert cosines == sorted(cosines, reverse=True)
    assert cosines[-1] < 0.999
    judge = report["metrics"]["judge_change"]
    assert judge["mean"] == pytest.approx(judge["candidate"] - judge["reference"], abs=1e-5)


def test_the_page_shows_the_images_next_to_it_and_loads_nothing_else(
    sample_artifact: Path, coarse_artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    facts = gate(
        *(coarse_artifact, "--reference", sample_artifact, "--prompts", "sample:5", "--contract", loose(tmp_path)),
        *("--out", out, "--images", 2),
    )
    assert facts["kept"]
    sources: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert tag not in ("script", "link", "iframe")
            sources.extend(value or "" for name, value in attrs if name in ("src", "href"))

    content = (out / "index.html").read_text()
    Reader().feed(content)
    assert "url(" not in content
    assert sorted(sources) == sorted(f"images/{path.name}" for path in (out / "images").iterdir())
    assert len(sources) == 6
    pair = max(json.loads((out / "report.json").read_text())["pairs"], key=lambda one: one["flip"])
    first = [np.asarray(Image.open(out / source)) for source in sources[:3]]
    assert pair["flip"] == pytest.approx(similarity.flip(first[0], first[1]), abs=1e-6)
    assert (out / "report.md").read_text().startswith("# coarse against sample: contract kept")


def test_a_second_report_replaces_the_first(sample_artifact: Path, tmp_path: Path) -> None:
    words = (sample_artifact, "--reference", sample_artifact, "--contract", loose(tmp_path), "--out", tmp_path / "r")
    for count in (1, 3):
        gate(*words, "--prompts", f"sample:{count}", "--steps", 1, "--images", 0)
    assert len(json.loads((tmp_path / "r" / "report.json").read_text())["pairs"]) == 3
    assert not list((tmp_path / "r" / "images").iterdir())


def test_images_of_any_size_are_gated_and_texts_are_escaped(sample_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("<b>A</b> & B\na dog\n")
    facts = gate(
        *(sample_artifact, "--reference", sample_artifact, "--prompts", tmp_path / "p.txt", "--steps", 1),
        *("--contract", loose(tmp_path), "--width", 64, "--height", 96, "--out", tmp_path / "report"),
    )
    assert "of 128 x 128 pixels, not 64 x 96" in facts["not_measured"]["judge_change"]
    assert facts["prompts"]["spec"] == "p.txt"
    page = (tmp_path / "report" / "index.html").read_text()
    assert "&lt;b&gt;A&lt;/b&gt; &amp; B" in page
    assert "<b>" not in page


def test_an_interrupted_gate_leaves_nothing(
    sample_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(similarity, "flip", interrupt)
    with pytest.raises(KeyboardInterrupt):
        gate(sample_artifact, "--reference", sample_artifact, "--prompts", "sample:2", "--out", tmp_path / "report")
    assert not list(tmp_path.iterdir())


def test_openvino_is_gated_against_onnx_runtime_and_certifies_nothing(
    sample_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    candidate = tmp_path / "candidate"
    shutil.copytree(sample_artifact, candidate)
    (candidate / CERTIFICATE).unlink(missing_ok=True)  # of another test
    words = (candidate, "--reference", sample_artifact, "--contract", loose(tmp_path))
    facts = gate(*words, "--prompts", "sample:2", "--steps", 2, "--runtime", "openvino-fp32")
    assert facts["runtime"] == "openvino-fp32"
    assert facts["versions"]["openvino"]
    assert facts["metrics"]["psnr"]["low"] > 50  # other kernels, the same numbers but for the order of sums
    assert "run by openvino-fp32" in capsys.readouterr().out
    assert not (candidate / CERTIFICATE).exists()


def test_the_runtime_of_a_server_is_not_chosen_by_the_gate(sample_artifact: Path) -> None:
    words = ("--url", "127.0.0.1:1", "--reference", sample_artifact, "--runtime", "openvino-bf16")
    with pytest.raises(UsageError, match="--runtime openvino-bf16 is for a candidate in this process"):
        gate(sample_artifact, *words)


def test_an_occupied_folder_is_rejected_before_anything_is_generated(sample_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match="exists and has no report.json; choose another --out or remove it"):
        gate(sample_artifact, "--reference", sample_artifact, "--out", tmp_path)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--seeds", "0"), "--seeds 0 is less than 1"),
        (("--images", "-1"), "--images -1 is less than 0"),
        (("--threads", "-1"), "--threads -1 is less than 0"),
        (("--contract", "none.toml"), "--contract none.toml: no such file"),
        (("--prompts", "sample:x"), "'x' is not a positive number"),
        (("--clip", "nowhere"), "--clip nowhere: config.json is missing"),
    ],
)
def test_wrong_use_is_rejected(sample_artifact: Path, words: tuple[str, str], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        gate(sample_artifact, "--reference", sample_artifact, *words)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--prompts", "kit"), r"prompt people-01: \d+ tokens with the chat template; the limit is 48"),
        (("--width", "100"), "width: 100 is not a multiple of 16"),
        (("--guidance", "3"), "guidance: 3 has no effect on"),
    ],
)
def test_invalid_requests_are_rejected_before_the_model_is_loaded(
    sample_artifact: Path, words: tuple[str, str], match: str
) -> None:
    with pytest.raises(RequestError, match=match):
        gate(sample_artifact, "--reference", sample_artifact, *words)
