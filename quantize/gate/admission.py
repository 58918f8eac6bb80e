"""Which two artifacts may be compared, and what must be said about the comparison."""

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
    """Two artifacts that draw the same image from the same seed but for their precision."""

    candidate: Manifest
    reference: Manifest
    warnings: tuple[str, ...]


def admit(candidate: Path, reference: Path) -> Admitted:
    """Verify both artifacts and refuse what cannot be compared; raises UsageError or ArtifactError."""
    ours, theirs = (verify(folder, ("onnx", "quantized")) for folder in (candidate, reference))
    for folder, manifest in ((candidate, ours), (reference, theirs)):
        missing = [part for part in SERVED_PARTS if part not in manifest.parts]
        if missing:
            raise UsageError(f"{folder} has no {' and no '.join(missing)}; the gate draws whole images, export it too")
        if manifest.compute == "bf16":
            raise UsageError(
                f"{folder} computes in bf16, for which ONNX Runtime's CPU provider has no kernels; gate its twin that "
                "was exported with --dtype fp32"
            )
    for name in ("transformer", "text_encoder", "vae", "guidance", "text_tokens", "family"):
        mine, its = (getattr(manifest.variant, name) for manifest in (ours, theirs))
        if mine != its:
            raise UsageError(
                f"{candidate} is {ours.variant.name} and {reference} is {theirs.variant.name}: their {name} differs; "
                "both artifacts must come from one checkpoint"
            )
    if ours.files.get(TOKENIZER) != theirs.files.get(TOKENIZER):
        raise UsageError(f"{candidate} and {reference} have different tokenizers; both must come from one checkpoint")
    return Admitted(ours, theirs, _warnings(candidate, reference, ours, theirs))


def _warnings(candidate: Path, reference: Path, ours: Manifest, theirs: Manifest) -> tuple[str, ...]:
    said = []
    if candidate.resolve() == reference.resolve():
        said.append("candidate and reference are one artifact: what differs is noise of the measurement")
    if theirs.kind == "quantized":
        said.append(
            f"the reference is itself quantized ({theirs.recipe}): differences are against it, not against the "
            "high-precision model"
        )
    if ours.kind == "onnx" and theirs.kind == "quantized":
        said.append("the reference is quantized and the candidate is not: are DIR and --reference the wrong way round?")
    parent = ours.source.get("parent")
    if parent is not None and theirs.kind == "onnx" and parent != digest(reference / MANIFEST):
        said.append(
            "the candidate was made from another artifact than the reference: what differs between those two counts "
            "against it as well"
        )
    return tuple(said)


def speaks_the_samples_grammar(manifest: Manifest) -> bool:
    """Tell whether an artifact has the sample's tokenizer, whose words are those of its grammar."""
    record = manifest.files.get(TOKENIZER)
    return record is not None and record.digest == digest(SHIPPED / TOKENIZER)
