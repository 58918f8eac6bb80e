"""Which artifacts the gate compares, and which it rejects."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.artifact import MANIFEST, Manifest, PartRecord, digest, write_manifest
from kit.checkpoint import SHIPPED
from kit.errors import UsageError
from kit.ports import SERVED_PARTS, ports
from kit.variants import Variant
from quantize.gate.admission import TOKENIZER, admit, speaks_the_samples_grammar


def artifact(folder: Path, tokenizer: str = "{}", parts: Any = SERVED_PARTS, **changes: Any) -> Path:
    """Write an artifact without graphs; admission does not open them."""
    variant = changes.pop("variant", Variant.named("klein-4b"))
    (folder / "tokenizer").mkdir(parents=True)
    (folder / TOKENIZER).write_text(tokenizer)
    records = {part: PartRecord(f"{part}/model.onnx", ports(part, variant, "fp32")) for part in parts}
    plain = Manifest("onnx", variant, "fp32", "fp32", {}, {}, records)
    write_manifest(folder, replace(plain, **changes))
    return folder


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    return artifact(tmp_path / "reference")


def test_a_quantized_artifact_against_its_source_gives_no_warning(tmp_path: Path, reference: Path) -> None:
    admitted = admit(artifact(tmp_path / "int8", kind="quantized", recipe="int8"), reference)
    assert admitted.warnings == ()
    assert admitted.candidate is not None
    assert (admitted.candidate.recipe, admitted.reference.recipe) == ("int8", "fp32")


def test_different_default_steps_are_accepted_since_both_use_the_same_number(tmp_path: Path, reference: Path) -> None:
    variant = replace(Variant.named("klein-4b"), steps=8)
    candidate = admit(artifact(tmp_path / "c", variant=variant), reference).candidate
    assert candidate is not None
    assert candidate.variant.steps == 8


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"variant": Variant.named("klein-9b")},
            "c is klein-9b and .*reference is klein-4b: their transformer differs",
        ),
        ({"variant": replace(Variant.named("klein-4b"), text_tokens=48)}, "their text_tokens differs"),
        ({"parts": ("transformer",)}, "c has no text_encoder and no vae_decoder; the gate generates whole images"),
        ({"compute": "bf16"}, "c computes in bf16, for which ONNX Runtime's CPU provider has no kernels"),
        ({"tokenizer": "{ }"}, "have different tokenizers"),
        ({"compute": "bf16", "kind": "deployment"}, "or a server of it with --url"),
    ],
)
def test_what_cannot_be_compared_is_rejected(
    tmp_path: Path, reference: Path, changes: dict[str, Any], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        admit(artifact(tmp_path / "c", **changes), reference)


def test_engines_and_packages_are_admitted_in_bf16_and_so_is_what_a_server_runs(
    tmp_path: Path, reference: Path
) -> None:
    for kind in ("engine", "aoti"):
        found = admit(artifact(tmp_path / kind, kind=kind, compute="bf16", recipe="fp8"), reference).candidate
        assert found is not None
        assert found.kind == kind
    served = artifact(tmp_path / "quantized", kind="quantized", compute="bf16", recipe="fp8")
    assert admit(served, reference, served=True).candidate is not None
    assert admit(None, reference, served=True).candidate is None


def test_a_deployment_is_not_a_reference(tmp_path: Path, reference: Path) -> None:
    with pytest.raises(UsageError, match="is an artifact of kind 'deployment'; expected onnx or quantized or engine"):
        admit(reference, artifact(tmp_path / "d", kind="deployment"))


def test_a_reference_that_is_more_quantized_than_the_candidate_is_a_warning(tmp_path: Path, reference: Path) -> None:
    coarse = artifact(tmp_path / "int8", kind="quantized", recipe="int8")
    itself_quantized, swapped = admit(reference, coarse).warnings
    assert "the reference is itself quantized (int8)" in itself_quantized
    assert "are DIR and --reference swapped?" in swapped


def test_a_candidate_of_another_parent_is_a_warning(tmp_path: Path, reference: Path) -> None:
    quantized = {"kind": "quantized", "recipe": "int8"}
    child = artifact(tmp_path / "child", source={"parent": digest(reference / MANIFEST)}, **quantized)
    stranger = artifact(tmp_path / "stranger", source={"parent": "0" * 64}, **quantized)
    assert admit(child, reference).warnings == ()
    assert "was not made from the reference but from another artifact" in admit(stranger, reference).warnings[0]


def test_an_artifact_against_itself_is_a_warning(reference: Path) -> None:
    assert "are the same artifact" in admit(reference, reference).warnings[0]


def test_the_samples_grammar_is_recognized_by_its_tokenizer(tmp_path: Path, reference: Path) -> None:
    plain = admit(reference, reference).reference
    assert not speaks_the_samples_grammar(plain)
    sample = artifact(tmp_path / "sample")
    shutil.copy(SHIPPED / TOKENIZER, sample / TOKENIZER)
    assert speaks_the_samples_grammar(write_manifest(sample, plain))
