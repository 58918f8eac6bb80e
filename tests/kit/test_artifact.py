"""Artifacts: which ones verify, which do not, and that an unfinished one is never mistaken for a finished one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from kit.artifact import (
    MANIFEST,
    Manifest,
    PartRecord,
    current,
    read_manifest,
    step_versions,
    verify,
    write_manifest,
)
from kit.atomic_folder import UNFINISHED, building
from kit.errors import ArtifactError, UsageError
from kit.outputs import ONNX, SEARCH
from kit.ports import ports
from kit.variants import VARIANTS

KLEIN = VARIANTS["klein-4b"]
DECODER = PartRecord("vae_decoder/model.onnx", ports("vae_decoder", KLEIN, "fp32"))
PLAN = Manifest("onnx", KLEIN, "fp32", "fp32", {"opset": 23}, {"checkpoint": "x"}, {"vae_decoder": DECODER})


def make(out: Path) -> Path:
    with building(out, ONNX) as folder:
        (folder / "vae_decoder").mkdir()
        (folder / "vae_decoder" / "model.onnx").write_bytes(b"graph")
        write_manifest(folder, PLAN)
    return out


def finish(folder: Path, recipe: str) -> None:
    (folder / SEARCH.mark).write_text(json.dumps({"recipe": recipe, "spare": "keep", "bounds": []}))


def test_a_manifest_survives_the_disk(tmp_path: Path) -> None:
    manifest = verify(make(tmp_path / "a"))
    assert (manifest.variant, manifest.parts, manifest.options) == (KLEIN, PLAN.parts, {"opset": 23})
    assert list(manifest.files) == ["vae_decoder/model.onnx"]


def test_an_artifact_is_current_when_a_step_of_the_same_revision_plans_the_same(tmp_path: Path) -> None:
    plan = replace(PLAN, versions=step_versions("export", 3))
    out = tmp_path / "a"
    assert not current(out, plan)
    with building(out, ONNX) as folder:
        write_manifest(folder, plan)
    assert current(out, plan)
    assert not current(out, replace(plan, versions=step_versions("export", 4)))
    assert not current(out, replace(plan, options={"opset": 24}))
    (out / MANIFEST).write_text("{")
    assert not current(out, plan)


def test_an_older_artifact_is_replaced(tmp_path: Path) -> None:
    out = make(tmp_path / "a")
    (out / "vae_decoder" / "model.onnx").unlink()
    make(out)
    assert (out / "vae_decoder" / "model.onnx").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_is_no_artifact_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="exists and is not an artifact; choose another --out"):
        make(tmp_path / "a")
    assert (tmp_path / "a" / "thesis.txt").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("x")])
def test_a_failed_step_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    def fail() -> None:
        with building(tmp_path / "a", ONNX) as folder:
            (folder / "big").write_bytes(b"0" * 1000)
            raise error

    with pytest.raises(type(error)):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_sentence(tmp_path: Path) -> None:
    def fill() -> None:
        with building(tmp_path / "a", ONNX):
            raise OSError(28, "No space left on device", "model.onnx")

    with pytest.raises(UsageError, match=r"cannot write .*a: No space left on device \(model.onnx\)"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    out = make(tmp_path / "a")
    (out / "vae_decoder" / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match="vae_decoder/model.onnx: missing; the artifact is incomplete"):
        verify(out)


@pytest.mark.parametrize(("content", "message"), [(b"grap", "has 4 bytes, the manifest says 5"), (b"Graph", "digest")])
def test_a_changed_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    out = make(tmp_path / "a")
    (out / "vae_decoder" / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=f"vae_decoder/model.onnx: .*{message}"):
        verify(out)


def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    out = make(tmp_path / "a")
    (tmp_path / "secret").write_bytes(b"graph")
    text = (out / MANIFEST).read_text()
    (out / MANIFEST).write_text(text.replace('"files": {\n  "vae_decoder/model.onnx"', '"files": {\n  "../secret"'))
    with pytest.raises(ArtifactError, match=r"\.\./secret: is outside the artifact's folder"):
        verify(out)


def test_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="of kind 'onnx'; expected engine or deployment"):
        verify(make(tmp_path / "a"), kinds=("engine", "deployment"))


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no manifest.json, so it is not a finished artifact"):
        read_manifest(tmp_path)
    with pytest.raises(UsageError, match="nowhere does not exist"):
        read_manifest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format": 1', '"format": 0', "written by another version of the kit"),
        ('"recipe"', '"recipy"', "key missing or unknown"),
        ("{", "", "not valid JSON"),
    ],
)
def test_a_broken_manifest_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    out = make(tmp_path / "a")
    (out / MANIFEST).write_text((out / MANIFEST).read_text().replace(old, new, 1))
    with pytest.raises(ArtifactError, match=f"manifest.json: {message}"):
        read_manifest(out)


def test_an_absent_part_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no transformer; it has: vae_decoder"):
        verify(make(tmp_path / "a")).part("transformer")


@pytest.mark.parametrize(("old", "locked", "stays"), [(True, False, False), (True, True, True), (False, False, True)])
def test_what_a_killed_process_left_is_removed_by_the_next(
    tmp_path: Path, old: bool, locked: bool, stays: bool
) -> None:
    """Folders that another process is building, or that are too new to judge, are kept."""
    left = tmp_path / f".out{UNFINISHED}abcdefgh"
    other = tmp_path / f".other{UNFINISHED}abcdefgh"
    for folder in (left, other):
        folder.mkdir()
        (folder / "half").write_text("of it")
        os.utime(folder, (0, 0) if old else None)
    descriptor = os.open(left, os.O_RDONLY)
    if locked:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    with building(tmp_path / "out", SEARCH) as folder:
        finish(folder, "done")
    os.close(descriptor)
    assert left.exists() == stays
    assert sorted(path.name for path in tmp_path.iterdir() if path != left) == [other.name, "out"]


def test_a_folder_is_locked_while_it_is_built(tmp_path: Path) -> None:
    with building(tmp_path / "out", SEARCH) as folder:
        os.utime(folder, (0, 0))
        with building(tmp_path / "out", SEARCH) as second:
            finish(second, "second")
        assert folder.is_dir()
        finish(folder, "first")
    assert json.loads((tmp_path / "out" / SEARCH.mark).read_text())["recipe"] == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def linked(artifact: Path, files: Path, name: Callable[[Path], str]) -> Path:
    """Move the files of an artifact to a folder and leave relative links, as a hub's cache does."""
    files.mkdir(parents=True)
    for path in [path for path in artifact.rglob("*") if path.is_file()]:
        target = files / name(path.relative_to(artifact))
        path.rename(target)
        path.symlink_to(os.path.relpath(target, path.parent))
    return artifact


def flat(path: Path) -> str:
    return hashlib.sha256(str(path).encode()).hexdigest()


def test_an_artifact_in_a_hubs_cache_verifies(tmp_path: Path) -> None:
    repository = tmp_path / "models--me--klein"
    artifact = linked(make(repository / "snapshots" / "0123abcd" / "build"), repository / "blobs", flat)
    assert verify(artifact).kind == "onnx"
    (tmp_path / "link").symlink_to(artifact)
    assert verify(tmp_path / "link").kind == "onnx"


def test_links_inside_the_artifact_verify_and_others_name_the_cure(tmp_path: Path) -> None:
    inside = make(tmp_path / "inside")
    assert verify(linked(inside, tmp_path / "inside" / "..data", flat)).kind == "onnx"
    outside = linked(make(tmp_path / "outside"), tmp_path / "elsewhere", flat)
    with pytest.raises(ArtifactError, match=r"links to .*elsewhere/.*, outside the artifact's folder; .* \(cp -rL\)"):
        verify(outside)


def test_no_message_shows_the_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError) as refusal, building(tmp_path / "out", ONNX) as folder:
        raise ArtifactError(f"{folder / 'tokenizer'}: missing")
    assert str(refusal.value) == f"{tmp_path / 'out' / 'tokenizer'}: missing"
    assert list(tmp_path.iterdir()) == []
