"""The gate judges a running server as it judges the artifact that the server deploys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.artifact import read_manifest
from kit.certificate import certificate_of
from kit.recipes import RECIPES
from quantize.__main__ import main
from quantize.apply.apply import apply
from serve.launch import Server
from tests.conftest import ByFamily

LOOSE = "format = 1\nleast_prompts = 1\n[bounds.flip]\nat_most = 1\n[bounds.latent_cosine]\nat_least = -1\n"


def gate(capsys: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    code = main(["gate", *map(str, words), "--json"])
    told = capsys.readouterr()
    assert code == 0, told.err
    facts: dict[str, Any] = json.loads(told.out.splitlines()[-1])
    return facts


@pytest.mark.server
def test_the_gate_against_a_server_equals_the_gate_on_its_artifact(
    server: Server, artifact_of: ByFamily, deployment_of: ByFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact = artifact_of("klein")
    apply(artifact, tmp_path / "coarse", RECIPES["int4-weights"])
    (tmp_path / "p.txt").write_text("a red fox\ntwo boats on a lake\n")
    (tmp_path / "loose.toml").write_text(LOOSE)
    same = ("--reference", tmp_path / "coarse", "--prompts", tmp_path / "p.txt", "--contract", tmp_path / "loose.toml")
    size = ("--width", "64", "--height", "96", "--steps", "2")
    local = gate(capsys, artifact, *same, *size)
    served = gate(capsys, "--url", f"http://{server.url}", *same, *size)
    assert local["candidate"]["kind"] == "onnx"
    assert served["candidate"] == {
        "name": f"http://{server.url}", "variant": None, "recipe": "unknown", "compute": "unknown", "kind": "server"
    }  # fmt: skip
    for name in ("psnr", "ssim", "flip", "colour"):
        assert served["metrics"][name]["mean"] == pytest.approx(local["metrics"][name]["mean"], rel=1e-3), name
    assert "latent_cosine" in local["metrics"]
    assert "latent_cosine" not in served["metrics"]
    deployment = deployment_of("klein")
    both = gate(capsys, deployment, "--url", server.url, *same, *size)
    assert both["candidate"]["url"] == server.url
    judged = certificate_of(deployment, read_manifest(deployment))
    assert judged is not None
    assert (judged.kept, judged.drawn_by) == (True, server.url)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "the candidate is missing: give the folder of an artifact, --url HOST:PORT, or both"),
        (("--url", "127.0.0.1:9"), 2, "--url alone does not tell the recipe; give --contract NAME, or the folder that"),
        (("--url", "nowhere", "--contract", "int8"), 2, "--url nowhere: expected HOST:PORT of the server's gRPC port"),
        (("--url", "127.0.0.1:9", "--contract", "int8"), 1, "no FLUX.2 server responds at 127.0.0.1:9; start one with"),
    ],
)
def test_a_server_that_cannot_be_judged_is_told_before_anything_is_drawn(
    words: tuple[str, ...],
    code: int,
    said: str,
    artifact_of: ByFamily,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "p.txt").write_text("a red fox\n")
    same = ("--reference", str(artifact_of("klein")), "--prompts", str(tmp_path / "p.txt"))
    assert main(["gate", *words, *same]) == code
    assert f"error: {said}" in capsys.readouterr().err


def test_a_deployment_requires_a_gate_that_was_passed(
    artifact_of: ByFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from serve.__main__ import main as serve

    artifact = tmp_path / "int4"
    apply(artifact_of("klein"), artifact, RECIPES["int4-weights"])
    write = ["repository", str(artifact), "--out", str(tmp_path / "d"), "--known-answer", "none", "--require-gate"]
    assert serve(write) == 1
    assert "int4 has no certificate; run: python -m quantize gate DIR --reference DIR" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("a red fox\n")
    (tmp_path / "loose.toml").write_text(LOOSE)
    same = ("--reference", artifact_of("klein"), "--prompts", tmp_path / "p.txt", "--width", "64", "--height", "64")
    gate(capsys, artifact, *same, "--steps", "1", "--contract", tmp_path / "loose.toml")
    assert serve(write) == 0
    assert "quality: contract loose.toml kept on 1 prompts" in capsys.readouterr().out
    assert certificate_of(tmp_path / "d", read_manifest(tmp_path / "d")) is not None
