"""The certificate of an artifact: the verdict of `quantize gate`, bound to what was judged by digests.

It lies beside the manifest as certificate.json, and is copied into deployments of the artifact. A certificate of other
bytes does not count.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kit.artifact import CERTIFICATE, MANIFEST, Manifest, digest, read_manifest
from kit.errors import CheckFailed

FORMAT = 1
SHOWN = ("psnr", "ssim", "flip")


@dataclass(frozen=True)
class Certificate:
    """What the gate found, and of which bytes."""

    kept: bool
    contract: str
    faults: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, Any]]  # mean, low and high by name
    prompts: Mapping[str, Any]
    reference: Mapping[str, Any]
    date: str
    system: str
    drawn_by: str  # this process, or the address of a server
    versions: Mapping[str, str] = field(default_factory=dict)
    manifest: str = ""  # digest of the judged artifact's manifest
    weights: str = ""  # digest of the whole content of its files

    def describe(self) -> str:
        """Return the verdict in one line."""
        figures = ", ".join(f"{name} {self.metrics[name]['mean']:.4g}" for name in SHOWN if name in self.metrics)
        verdict = "kept" if self.kept else f"broken ({'; '.join(self.faults)})"
        prompts = f"{self.prompts.get('count', '?')} prompts"
        return f"contract {self.contract} {verdict} on {prompts}, {self.date}: {figures}"


def certify(folder: Path, certificate: Certificate) -> None:
    """Write the certificate of an artifact, bound to its bytes; reads all of its files."""
    bound = asdict(certificate) | {"manifest": digest(folder / MANIFEST), "weights": content_digest(folder)}
    (folder / CERTIFICATE).write_text(json.dumps({"format": FORMAT, **bound}, indent=1) + "\n")


def content_digest(folder: Path) -> str:
    """Digest the content of all files that the manifest lists, weights included."""
    whole = hashlib.sha256()
    for name in sorted(read_manifest(folder).files):
        with (folder / name).open("rb") as stream:
            whole.update(name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return whole.hexdigest()


def read_certificate(folder: Path) -> Certificate | None:
    """Return the certificate in a folder, whatever it is bound to; None if there is none that can be read."""
    try:
        raw = json.loads((folder / CERTIFICATE).read_bytes())
        if raw.pop("format") != FORMAT:
            return None
        return Certificate(**{**raw, "faults": tuple(raw["faults"])})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def certificate_of(folder: Path, manifest: Manifest) -> Certificate | None:
    """Return the certificate of an artifact or of what a deployment was made from; None if it is of something else."""
    found = read_certificate(folder)
    if found is None:
        return None
    judged = {digest(folder / MANIFEST)}
    if manifest.kind == "deployment":
        judged.add(str(manifest.source.get("manifest", "")))
    return found if found.manifest in judged else None


def quality(folder: Path, manifest: Manifest) -> str:
    """Say in one line what is known about the quality of an artifact's images."""
    found = certificate_of(folder, manifest)
    if found is not None:
        return found.describe()
    if read_certificate(folder) is not None:
        return "its certificate is of another artifact; run `quantize gate` again"
    return "not judged yet; run `quantize gate`"


def require(folder: Path, manifest: Manifest) -> Certificate:
    """Return the certificate of an artifact; raises CheckFailed if it has none, or if its contract was broken."""
    found = certificate_of(folder, manifest)
    again = "run: python -m quantize gate DIR --reference DIR"
    if found is None:
        what = "has a certificate of other files" if (folder / CERTIFICATE).exists() else "has no certificate"
        raise CheckFailed(f"{folder} {what}; {again}")
    if not found.kept:
        raise CheckFailed(f"{folder} did not pass the gate: {found.describe()}")
    if found.weights != content_digest(folder):
        raise CheckFailed(f"{folder}: its files changed after the gate judged them; {again}")
    return found
