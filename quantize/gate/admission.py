"""Check that two artifacts can be compared, and collect warnings about the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kit.artifact import MANIFEST, FileRecord, Kind, Manifest, digest, verify
from kit.checkpoint import SHIPPED
from kit.errors import UsageError
from kit.ports import SERVED_PARTS

TOKENIZER = "tokenizer/tokenizer.json"
RUNNABLE: tuple[Kind, ...] = ("onnx", "quantized", "engine", "aoti")


@dataclass(frozen=True)
class Admitted:
    """Two artifacts that generate the same image from the same seed, up to their precision."""

    candidate: Manifest | None  # None: a server, whose artifact was not given
    reference: Manifest
    warnings: tuple[str, ...]


def admit(candidate: Path | None, reference: Path, served: bool = False) -> Admitted:
    """Verify both artifacts; raises UsageError or ArtifactError if they cannot be compared.

    With `served`, a server generates the candidate's images, so that this machine need not be able to run it; the
    candidate may then be missing.
    """
    theirs = verify(reference, RUNNABLE)
    if candidate is None:
        _check_runs(reference, theirs)
        return Admitted(None, theirs, ())
    ours = verify(candidate, (*RUNNABLE, "deployment"))
    for folder, manifest in ((candidate, ours), (reference, theirs)):
        missing = [part for part in SERVED_PARTS if part not in manifest.parts]
        if missing:
            raise UsageError(
                f"{folder} has no {' and no '.join(missing)}; the gate generates whole images, so export all parts"
            )
        if folder is reference or not served:
            _check_runs(folder, manifest)
    for name in ("transformer", "text_encoder", "vae", "guidance", "text_tokens", "family"):
        mine, its = (getattr(manifest.variant, name) for manifest in (ours, theirs))
        if mine != its:
            raise UsageError(
                f"{candidate} is {ours.variant.name} and {reference} is {theirs.variant.name}: their {name} differs; "
                "both artifacts must come from the same checkpoint"
            )
    if _tokenizer(ours) != _tokenizer(theirs):
        raise UsageError(f"{candidate} and {reference} have different tokenizers; both must come from one checkpoint")
    return Admitted(ours, theirs, _warnings(candidate, reference, ours, theirs))


def _check_runs(folder: Path, manifest: Manifest) -> None:
    """Reject an artifact that no runtime of this machine runs."""
    if manifest.compute == "bf16" and manifest.kind not in ("engine", "aoti"):
        raise UsageError(
            f"{folder} computes in bf16, for which ONNX Runtime's CPU provider has no kernels; gate the same artifact "
            "exported with --dtype fp32, engines built from it, or a server of it with --url"
        )


def _tokenizer(manifest: Manifest) -> FileRecord | None:
    """Return the record of the tokenizer, which a deployment keeps in a folder of its own."""
    return manifest.files.get(TOKENIZER, manifest.files.get(f"tokenizer/1/{TOKENIZER}"))


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
    record = _tokenizer(manifest)
    return record is not None and record.digest == digest(SHIPPED / TOKENIZER)
