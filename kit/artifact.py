"""Artifacts: folders that one step writes and the next step reads, each with a manifest of what, from what and how."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from kit import safetensors_file
from kit.dtypes import Compute
from kit.errors import ArtifactError, Flux2Error, UsageError
from kit.ports import PartName, Port, Ports
from kit.variants import TextEncoder, Transformer, Vae, Variant

logger = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 1
TEXTS = ("model_index.json", "scheduler", "tokenizer")  # json and text files that a server needs; never weights
Kind = Literal["onnx", "quantized", "engine", "aoti", "deployment"]


@dataclass(frozen=True)
class FileRecord:
    """Size and digest of one file: sha256 of the content; of header and size for safetensors (weights stay unread)."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class PartRecord:
    """One exported part: its graph, relative to the artifact, and its ports."""

    graph: str
    ports: Ports


@dataclass(frozen=True)
class Manifest:
    """What an artifact is, from what it was made, and the digest of every file."""

    kind: Kind
    variant: Variant
    compute: Compute
    recipe: str
    options: Mapping[str, Any]  # of the step that made it: attention form, opset, GPU, ...
    source: Mapping[str, Any]  # the checkpoint or the parent artifact, with digests
    parts: Mapping[PartName, PartRecord] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def part(self, name: PartName) -> PartRecord:
        if name not in self.parts:
            raise ArtifactError(f"the artifact has no {name}; it has: {', '.join(self.parts) or 'no parts'}")
        return self.parts[name]


def digest(path: Path) -> str:
    """Digest a file: safetensors by header and size, everything else by content."""
    if path.suffix == ".safetensors":
        return safetensors_file.header_digest(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Record every file below a folder except its manifest, by path relative to it."""
    return {
        str(p.relative_to(folder)): FileRecord(p.stat().st_size, digest(p))
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p != folder / MANIFEST
    }


def tool_versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages that shape an artifact; those not installed are left out."""
    versions = {}
    for package in ("flux2-deploy", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def step_versions(step: str, revision: int, *packages: str) -> dict[str, str]:
    """Return what a manifest's `versions` say of the step that made it: the packages, and the step's own revision.

    A step carries a constant REVISION that is raised when the same inputs give another result, so that artifacts made
    before are made again; a change of its help texts, its errors or its layout leaves them as they are.
    """
    return tool_versions(*packages) | {f"{step} revision": str(revision)}


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a filled folder, with the record of all its files."""
    full = replace(manifest, files=record_files(folder))
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, **asdict(full)}, indent=1) + "\n")
    return full


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest without checking the files.

    Raises UsageError when the folder is no artifact, ArtifactError when the manifest cannot be understood.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no manifest.json, so it is not a finished artifact" if folder.is_dir() else "does not exist"
        raise UsageError(f"{folder} {what}")
    try:
        raw = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error})") from None
    if raw.pop("format", None) != FORMAT:
        raise ArtifactError(f"{path}: written by another version of the kit (format is not {FORMAT}); export again")
    try:
        raw["variant"] = variant_from_json(raw["variant"])
        raw["parts"] = {k: PartRecord(v["graph"], ports_from_json(v["ports"])) for k, v in raw["parts"].items()}
        raw["files"] = {k: FileRecord(**v) for k, v in raw["files"].items()}
        return Manifest(**raw)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: key missing or unknown ({error})") from None


def verify(folder: Path, kinds: tuple[Kind, ...] = ()) -> Manifest:
    """Read a manifest and check every file it names: present, inside the folder, same size and digest.

    `kinds` limits what is accepted. Raises ArtifactError or UsageError with one sentence that names the file.
    """
    manifest = read_manifest(folder)
    if kinds and manifest.kind not in kinds:
        raise UsageError(f"{folder} is an artifact of kind {manifest.kind!r}; needed: {' or '.join(kinds)}")
    root = folder.resolve()
    for name, record in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(root):
            raise ArtifactError(f"{path}: leaves the artifact's folder")
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; the artifact is incomplete, make it again")
        size = path.stat().st_size
        if size != record.bytes:
            raise ArtifactError(f"{path}: has {size} bytes, the manifest says {record.bytes}; make the artifact again")
        if digest(path) != record.digest:
            raise ArtifactError(f"{path}: its digest differs from the manifest; make the artifact again")
    return manifest


def current(out: Path, planned: Manifest) -> bool:
    """Tell whether the artifact at `out` verifies and is what a step plans to make, files aside."""
    found = verified_or_none(out, (planned.kind,))
    return found is not None and replace(found, files={}) == replace(planned, files={})


def verified_or_none(out: Path, kinds: tuple[Kind, ...]) -> Manifest | None:
    """Return the manifest of the artifact at `out`, None when there is none that verifies."""
    if not (out / MANIFEST).is_file():
        return None
    try:
        return verify(out, kinds)
    except Flux2Error as error:
        logger.info("%s will be made again: %s", out, error)
        return None


def variant_from_json(raw: dict[str, Any]) -> Variant:
    """Rebuild a Variant from what `dataclasses.asdict` and JSON made of it."""
    return Variant(
        **{
            **raw,
            "transformer": Transformer(**_tuples(raw["transformer"])),
            "text_encoder": TextEncoder(**_tuples(raw["text_encoder"])),
            "vae": Vae(**_tuples(raw["vae"])),
        }
    )


def ports_from_json(raw: dict[str, Any]) -> Ports:
    """Rebuild Ports from what `dataclasses.asdict` and JSON made of them."""
    return Ports(*(tuple(Port(**_tuples(p)) for p in raw[side]) for side in ("inputs", "outputs")))


def _tuples(raw: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where the dataclasses have tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}


def copy_texts(source: Path, target: Path) -> None:
    """Copy the configs and tokenizer files of an artifact to one that is made from it."""
    for name in TEXTS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def link_or_copy(source: Path, target: Path) -> Literal["linked", "copied"]:
    """Put a file into an artifact as a hard link, or as a copy where the file system does not link."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
        return "linked"
    except OSError:
        shutil.copy2(source, target)  # keeps the time stamp, by which a later export sees that nothing changed
        return "copied"
