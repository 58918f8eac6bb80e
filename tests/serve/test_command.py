"""The command line of serve: exit codes, messages, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.artifact import ExportConfig, export
from pipeline.images import decode, encode
from pipeline.request import Limits
from serve.__main__ import main
from serve.client import Client
from serve.launch import Server
from serve.settings import Settings, Tuning
from tests.conftest import ByFamily


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main([*argv])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.server
def test_generate_writes_the_image_and_prints_the_seed(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fox.png"
    options = ["--url", server.url, "--out", str(out), "--seed", "3", "--width", "64", "--height", "96", "--steps", "2"]
    code, text, _ = run(capsys, "generate", "a red fox", *options, "--json")
    facts = json.loads(text.splitlines()[-1])
    assert (code, facts["images"], facts["seed"]) == (0, [str(out)], 3)
    assert decode(out.read_bytes()).shape == (96, 64, 3)


@pytest.mark.server
def test_generate_sends_references_in_their_order_and_a_mask(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [encode(np.full((64, 80, 3), value, np.uint8), "png") for value in (40, 200)]
    white = encode(np.full((64, 80, 3), 255, np.uint8), "png")
    for name, data in zip(("a.png", "b.png", "mask.png"), (*images, white), strict=True):
        (tmp_path / name).write_bytes(data)
    options = ["--url", server.url, "--out", str(tmp_path / "fox.png"), "--seed", "3", "--steps", "2"]
    for name in ("a.png", "b.png"):
        options += ["--image", str(tmp_path / name)]
    options += ["--mask", str(tmp_path / "mask.png"), "--strength", "0.7"]
    assert run(capsys, "generate", "make it blue", *options)[0] == 0
    fields = {"prompt": "make it blue", "seed": 3, "steps": 2, "images": images, "mask": white, "strength": 0.7}
    with Client(server.url) as client:
        assert (tmp_path / "fox.png").read_bytes() == client.generate(fields, timeout=60).images[0]


@pytest.mark.server
def test_generate_numbers_several_images(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--url", server.url, "--out", str(tmp_path / "fox.jpg"), "--num-images", "2", "--steps", "1"]
    assert run(capsys, "generate", "a red fox", *options)[0] == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["fox-1.jpg", "fox-2.jpg"]


@pytest.mark.server
def test_generate_prints_why_the_server_rejected_a_request(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--url", server.url, "--out", str(tmp_path / "fox.png"), "--width", "100"]
    code, _, err = run(capsys, "generate", "a red fox", *options)
    assert (code, err) == (2, "error: width: 100 is not a multiple of 16; nearest: 96 or 112\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "x", "--out", "x.gif"], "--out x.gif: the suffix must be one of .png, .jpg, .jpeg, .webp"),
        (["generate", "x", "--out", "nowhere/x.png"], "--out nowhere/x.png: cannot write into nowhere"),
        (["generate", "x", "--out", "-", "--json"], "--out -: stdout holds the image, so --json cannot be combined"),
        (["generate", "x", "--out", "-", "--num-images", "2"], "--out -: stdout holds one image, not 2; leave --num"),
        (
            ["generate", "x", "--out", "x.png", "--url", "localhost"],
            "--url localhost: expected HOST:PORT of the server",
        ),
        (["generate", "x", "--out", "x.png", "--image", "a.png"], "--image a.png: No such file or directory"),
        (
            ["generate", "x", "--out", "x.png", "--image", "../text"],
            "--image ../text: 9 bytes that are not a PNG, JPEG",
        ),
        (
            ["generate", "x", "--out", "x.png", "--mask", "../empty"],
            "--mask ../empty: 0 bytes; expected a PNG, JPEG or WebP",
        ),
        (["repository", "nowhere", "--out", "x", "--max-references", "-1"], "--max-references -1: too small"),
        (["repository", "nowhere", "--out", "-"], "--out -: a folder cannot be written to stdout; give a folder name"),
        (["generate", "x", "--out", "x.png", "--timeout", "-1"], "--timeout -1: must be more than 0 seconds"),
        (
            ["generate", "x", "--out", "x.png", "--sigmas", "a,b"],
            "argument --sigmas: 'a,b' is not a list of numbers separated by commas; see",
        ),
        (["repository", "nowhere", "--out", "x"], "nowhere does not exist"),
        (
            ["repository", "nowhere", "--out", "x", "--min-side", "50"],
            "--min-side 50: must be a positive multiple of 16",
        ),
        (["repository", "nowhere", "--out", "x", "--max-rows", "0"], "--max-rows 0: too small"),
        (["run", "nowhere"], "nowhere does not exist"),
    ],
)
def test_wrong_use_prints_one_sentence_and_exits_with_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text").write_text("a red fox")
    (tmp_path / "empty").touch()
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    code, out, err = run(capsys, *argv, "--json")
    assert code == 2
    assert err.startswith("error: ")
    assert message in err
    assert message in json.loads(out.splitlines()[-1])["error"]
    assert not list(here.iterdir())


def test_repository_writes_limits_and_tuning(
    artifact_of: ByFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deploy"
    options = ["--max-steps", "9", "--live-requests", "3", "--json"]
    code, text, _ = run(capsys, "repository", str(artifact_of("klein")), "--out", str(out), *options)
    assert (code, json.loads(text.splitlines()[-1])["variant"]) == (0, "klein-custom")
    settings = Settings.read(out / "denoiser" / "1")
    assert (settings.limits, settings.tuning) == (Limits(max_steps=9), Tuning(live_requests=3))
    links = {path.stat().st_nlink for path in out.rglob("*.safetensors")}
    assert min(links) > 1, "weights are hard links"


def test_a_bf16_artifact_is_rejected_for_onnx_runtime(
    checkpoint_of: ByFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint_of("klein"), tmp_path / "a", ExportConfig(parts=("vae_decoder",), dtype="bf16"))
    code, _, err = run(capsys, "repository", str(tmp_path / "a"), "--out", str(tmp_path / "d"))
    assert code == 2
    assert "computes in bf16, which no CPU runtime supports; export it with --dtype fp32" in err


def test_an_artifact_without_a_part_is_rejected(
    checkpoint_of: ByFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint_of("klein"), tmp_path / "a", ExportConfig(parts=("vae_decoder",)))
    code, _, err = run(capsys, "repository", str(tmp_path / "a"), "--out", str(tmp_path / "d"))
    assert code == 1
    assert "the artifact has no text_encoder; it has: vae_decoder" in err


@pytest.mark.parametrize("name", ["png", "webp", "jpeg"])
def test_images_survive_their_encoding(name: Any) -> None:
    pixels = np.full((32, 48, 3), 200, np.uint8)
    assert np.abs(decode(encode(pixels, name)).astype(int) - 200).max() <= 2
