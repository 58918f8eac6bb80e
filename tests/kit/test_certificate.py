"""A certificate counts only for the bytes that were judged, and only if the contract was kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kit.artifact import CERTIFICATE, MANIFEST, Manifest, digest, read_manifest, verify, write_manifest
from kit.certificate import Certificate, certificate_of, certify, quality, read_certificate, require
from kit.errors import CheckFailed
from kit.variants import VARIANTS

KEPT = Certificate(
    kept=True,
    contract="int8",
    faults=(),
    metrics={"psnr": {"mean": 53.384, "low": 52.9, "high": 53.8}},
    prompts={"spec": "sample:200", "count": 200},
    reference={"name": "sample"},
    date="2026-11-27",
    system="Linux",
    drawn_by="this process",
)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "int8"
    folder.mkdir()
    (folder / "graph").write_bytes(b"graph")
    write_manifest(folder, Manifest("quantized", VARIANTS["klein-4b"], "fp32", "int8", {}, {}))
    return folder


def test_a_certificate_is_read_back_and_leaves_the_artifact_valid(artifact: Path) -> None:
    certify(artifact, KEPT)
    manifest = verify(artifact)
    found = require(artifact, manifest)
    assert replace(found, manifest="", weights="") == KEPT
    assert quality(artifact, manifest) == "contract int8 kept on 200 prompts, 2026-11-27: psnr 53.38"


def test_an_artifact_without_a_certificate_is_refused(artifact: Path) -> None:
    assert quality(artifact, read_manifest(artifact)) == "not judged yet; run `quantize gate`"
    with pytest.raises(CheckFailed, match="int8 has no certificate; run: python -m quantize gate DIR --reference DIR"):
        require(artifact, read_manifest(artifact))


def test_a_broken_contract_is_refused(artifact: Path) -> None:
    certify(artifact, replace(KEPT, kept=False, faults=("psnr at least 45: found 30",)))
    with pytest.raises(
        CheckFailed, match=r"did not pass the gate: contract int8 broken \(psnr at least 45: found 30\)"
    ):
        require(artifact, read_manifest(artifact))


def test_a_certificate_of_other_bytes_does_not_count(artifact: Path) -> None:
    certify(artifact, KEPT)
    (artifact / "graph").write_bytes(b"grape")
    with pytest.raises(CheckFailed, match="its files changed after the gate judged them"):
        require(artifact, read_manifest(artifact))
    write_manifest(artifact, replace(read_manifest(artifact), recipe="int4-weights"))
    with pytest.raises(CheckFailed, match="has a certificate of other files"):
        require(artifact, read_manifest(artifact))
    assert "its certificate is of another artifact" in quality(artifact, read_manifest(artifact))


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1, "kept": true}'])
def test_what_is_no_certificate_does_not_count(artifact: Path, content: str) -> None:
    (artifact / CERTIFICATE).write_text(content)
    assert read_certificate(artifact) is None


def test_a_deployment_has_the_certificate_of_its_artifact(artifact: Path, tmp_path: Path) -> None:
    certify(artifact, KEPT)
    deployment = tmp_path / "deployment"
    deployment.mkdir()
    (deployment / CERTIFICATE).write_bytes((artifact / CERTIFICATE).read_bytes())
    source = {"artifact": "int8", "manifest": digest(artifact / MANIFEST)}
    made = write_manifest(deployment, Manifest("deployment", VARIANTS["klein-4b"], "fp32", "int8", {}, source))
    assert certificate_of(deployment, made) is not None
    assert CERTIFICATE not in made.files
    other = replace(made, source={"artifact": "int8", "manifest": "0" * 64})
    assert certificate_of(deployment, other) is None
    engine = replace(made, kind="engine")  # an engine has its own rounding, so it is judged by itself
    assert certificate_of(deployment, engine) is None
    assert json.loads((deployment / CERTIFICATE).read_text())["contract"] == "int8"
