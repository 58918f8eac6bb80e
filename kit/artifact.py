"""Read, write and verify artifacts: folders passed between steps, each with a manifest of its content and origin."""

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
CERTIFICATE = "certificate.json"  # what `quantize gate` adds to the artifact it judged; bound to the manifest's digest
CONTENTS = "contents.json"  # what `serve run` adds to a deployment: digests of its weights by content
FORMAT = 1
TEXTS = ("model_index.json", "scheduler", "tokenizer")  # json and text files that a server needs; never weights
Kind = Literal["onnx", "quantized", "engine", "aoti", "deployment"]


@dataclass(frozen=True)
class FileRecord:
    """Size and digest of one file: sha256 of the content, or of header and size for safetensors files."""

    bytes: int
    digest: str


@dataclass(frozen=True)
class PartRecord:
    """One exported part: its graph, relative to the artifact, and its ports."""

    graph: str
    ports: Ports


@dataclass(frozen=True)
class Manifest:
    """The kind of an artifact, its origin and settings, and the digest of every file."""

    kind: Kind
    variant: Variant
    compute: Compute
    recipe: str
    options: Mapping[str, Any]  # of the step that wrote it: attention form, opset, GPU, ...
    source: Mapping[str, Any]  # the checkpoint or parent artifact, with digests
    parts: Mapping[PartName, PartRecord] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def part(self, name: PartName) -> PartRecord:
        if name not in self.parts:
            raise ArtifactError(f"the artifact has no {name}; it has: {', '.join(self.parts) or 'no parts'}")
        return self.parts[name]


def digest(path: Path) -> str:
    """Return the digest of a file: safetensors by header and size, other files by content."""
    if path.suffix == ".safetensors":
        return safetensors_file.header_digest(path)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def record_files(folder: Path) -> dict[str, FileRecord]:
    """Record every file in a folder except its manifest, certificate and contents, by path relative to the folder."""
    return {
        str(p.relative_to(folder)): FileRecord(p.stat().st_size, digest(p))
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p not in (folder / MANIFEST, folder / CERTIFICATE, folder / CONTENTS)
    }


def tool_versions(*packages: str) -> dict[str, str]:
    """Return the installed versions of packages that affect an artifact, without those that are not installed."""
    versions = {}
    for package in ("flux2-deploy", *packages):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def step_versions(step: str, revision: int, *packages: str) -> dict[str, str]:
    """Return the `versions` of a manifest: the packages of the step and the step's own revision.

    Each step has a constant REVISION that is incremented when the same inputs produce a different result, so that older
    artifacts are rebuilt. Changes to help texts, errors or module layout do not affect it.
    """
    return tool_versions(*packages) | {f"{step} revision": str(revision)}


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a filled folder, with records of all its files."""
    full = replace(manifest, files=record_files(folder))
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, **asdict(full)}, indent=1) + "\n")
    return full


def read_manifest(folder: Path) -> Manifest:
    """Read a manifest without checking the files.

    Raises UsageError if the folder is not an artifact and ArtifactError if the manifest is invalid.
    """
    path = folder / MANIFEST
    if not path.is_file():
        what = "has no manifest.json, so it is not a finished artifact" if folder.is_dir() else "does not exist"
        raise UsageError(f"{folder} {what}")
    try:
        raw = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(raw, dict) or raw.pop("format", None) != FORMAT:
        raise ArtifactError(f"{path}: written by another version of the kit (format is not {FORMAT}); export again")
    try:
        raw["variant"] = variant_from_json(raw["variant"])
        raw["parts"] = {k: PartRecord(v["graph"], ports_from_json(v["ports"])) for k, v in raw["parts"].items()}
        raw["files"] = {k: FileRecord(**v) for k, v in raw["files"].items()}
        return Manifest(**raw)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArtifactError(f"{path}: key missing or unknown, or a value of the wrong type ({error})") from None


def verify(folder: Path, kinds: tuple[Kind, ...] = ()) -> Manifest:
    """Read a manifest and check every file in it: present, inside the folder, with the recorded size and digest.

    `kinds` limits the accepted kinds. Raises ArtifactError or UsageError with one sentence that names the file.
    """
    manifest = read_manifest(folder)
    if kinds and manifest.kind not in kinds:
        raise UsageError(f"{folder} is an artifact of kind {manifest.kind!r}; expected {' or '.join(kinds)}")
    roots = _roots(folder)
    for name, record in manifest.files.items():
        path = folder / name
        if not any(path.resolve().is_relative_to(root) for root in roots):
            linked = f"links to {path.resolve()}, " if path.is_symlink() else "is "
            cure = "; copy the files themselves (cp -rL)" if path.is_symlink() else ""
            raise ArtifactError(f"{path}: {linked}outside the artifact's folder{cure}")
        if not path.is_file():
            raise ArtifactError(f"{path}: missing; the artifact is incomplete, rebuild it")
        size = path.stat().st_size
        if size != record.bytes:
            raise ArtifactError(f"{path}: has {size} bytes, the manifest says {record.bytes}; rebuild the artifact")
        if digest(path) != record.digest:
            raise ArtifactError(f"{path}: its digest differs from the manifest; rebuild the artifact")
    return manifest


def _roots(folder: Path) -> tuple[Path, ...]:
    """Return the folders that an artifact's files may be in: its own, and the files of its repository in a hub's cache.

    A cache of the hub holds links from snapshots/REVISION/ to blobs/. What the user named may itself be a link.
    """
    named, real = Path(os.path.abspath(folder)), folder.resolve()
    roots = {real}
    for place in (named, real):
        for parent in place.parents:
            if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
                roots.add((parent.parent / "blobs").resolve())
    return tuple(roots)


def current(out: Path, planned: Manifest) -> bool:
    """Return whether the artifact at `out` verifies and equals the planned one, apart from the file records."""
    found = verified_or_none(out, (planned.kind,))
    return found is not None and replace(found, files={}) == replace(planned, files={})


def verified_or_none(out: Path, kinds: tuple[Kind, ...]) -> Manifest | None:
    """Return the manifest of the artifact at `out`, or None if there is none or it does not verify."""
    if not (out / MANIFEST).is_file():
        return None
    try:
        return verify(out, kinds)
    except Flux2Error as error:
        logger.info("%s will be rebuilt: %s", out, error)
        return None


def variant_from_json(raw: dict[str, Any]) -> Variant:
    """Rebuild a Variant from its `dataclasses.asdict` form in JSON."""
    return Variant(
        **{
            **raw,
            "transformer": Transformer(**_tuples(raw["transformer"])),
            "text_encoder": TextEncoder(**_tuples(raw["text_encoder"])),
            "vae": Vae(**_tuples(raw["vae"])),
        }
    )


def ports_from_json(raw: dict[str, Any]) -> Ports:
    """Rebuild Ports from their `dataclasses.asdict` form in JSON."""
    return Ports(*(tuple(Port(**_tuples(p)) for p in raw[side]) for side in ("inputs", "outputs")))


def _tuples(raw: dict[str, Any]) -> dict[str, Any]:
    """Convert lists, which JSON has instead of tuples, back to tuples."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}


def copy_texts(source: Path, target: Path) -> None:
    """Copy the configs and tokenizer files of an artifact to one that is made from it."""
    for name in TEXTS:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def link_or_copy(source: Path, target: Path) -> Literal["linked", "copied"]:
    """Hard-link a file into an artifact, or copy it if the file system does not support that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
        return "linked"
    except OSError:
        shutil.copy2(source, target)  # keeps the modification time, which a later export compares
        return "copied"
