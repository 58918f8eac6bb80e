"""Check that two artifacts can be compared, and collect warnings about the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kit.artifact import MANIFEST, Manifest, digest, verify
from kit.checkpoint import SHIPPED
from kit.errors import UsageError
from kit.ports import SERVED_PARTS

TOKENIZER = "tokenizer/tokenizer.json"


@dataclass(frozen=True)
class Admitted:
    """Two artifacts that generate the same image from the same seed, up to their precision."""

    candidate: Manifest
    reference: Manifest
    warnings: tuple[str, ...]


def admit(candidate: Path, reference: Path) -> Admitted:
    """Verify both artifacts; raises UsageError or ArtifactError if they cannot be compared."""
    ours, theirs = (verify(folder, ("onnx", "quantized")) for folder in (candidate, reference))
    for folder, manifest in ((candidate, ours), (reference, theirs)):
        missing = [part for part in SERVED_PARTS if part not in manifest.parts]
        if missing:
            raise UsageError(
                f"{folder} has no {' and no '.join(missing)}; the gate generates whole images, so export all parts"
            )
        if manifest.compute == "bf16":
            raise UsageError(
                f"{folder} computes in bf16, for which ONNX Runtime's CPU provider has no kernels; gate the same "
                "artifact exported with --dtype fp32"
            )
    for name in ("transformer", "text_encoder", "vae", "guidance", "text_tokens", "family"):
        mine, its = (getattr(manifest.variant, name) for manifest in (ours, theirs))
        if mine != its:
            raise UsageError(
                f"{candidate} is {ours.variant.name} and {reference} is {theirs.variant.name}: their {name} differs; "
                "both artifacts must come from the same checkpoint"
            )
    if ours.files.get(TOKENIZER) != theirs.files.get(TOKENIZER):
        raise UsageError(f"{candidate} and {reference} have different tokenizers; both must come from one checkpoint")
    return Admitted(ours, theirs, _warnings(candidate, reference, ours, theirs))


def _warnings(candidate: Path, reference: Path, ours: Manifest, theirs: Manifest) -> tuple[str, ...]:
    warnings = []
    if candidate.resolve() == reference.resolve():
        warnings.append("candidate and reference are the same artifact: any difference is measurement noise")
    if theirs.kind == "quantized":
        warnings.append(
            f"the reference is itself quantized ({theirs.recipe}): differences are relative to it, not to the "
            "high-precision model"
        )
    if ours.kind == "onnx" and theirs.kind == "quantized":
        warnings.append("the reference is quantized and the candidate is not: are DIR and --reference swapped?")
    parent = ours.source.get("parent")
    if parent is not None and theirs.kind == "onnx" and parent != digest(reference / MANIFEST):
        warnings.append(
            "the candidate was not made from the reference but from another artifact: differences between these two "
            "are counted too"
        )
    return tuple(warnings)


def speaks_the_samples_grammar(manifest: Manifest) -> bool:
    """Return whether an artifact has the sample's tokenizer, which knows only the words of the sample's grammar."""
    record = manifest.files.get(TOKENIZER)
    return record is not None and record.digest == digest(SHIPPED / TOKENIZER)
