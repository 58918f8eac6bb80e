"""Weights that change after deployment are noticed: by their content, and by the known answer."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kit.artifact import CONTENTS, MANIFEST, read_manifest, verify
from kit.errors import ArtifactError, CheckFailed, UsageError
from kit.outputs import DEPLOYMENT, check_out
from kit.safetensors_file import read_folder
from pipeline.images import encode
from pipeline.local import LocalPipeline
from pipeline.request import Limits
from serve import contents, probe
from serve.commands.repository import CopyProgress
from serve.contents import Content, Reader, check, content_digest, read_contents, weight_files, write_contents
from serve.repository import write_repository
from serve.settings import Tuning
from tests.conftest import ByFamily

NAME = "denoiser/1/transformer/diffusion_pytorch_model.safetensors"


def negate(folder: Path, tensor: str, count: int = 100) -> None:
    """Change the sign of some fp32 weights in place, as a write through a hard link does."""
    found = read_folder(folder)[tensor]
    values = np.memmap(found.file, "<f4", "r+", found.offset, (found.nbytes // 4,))
    values[values.size // 2 :][:count] *= -1
    values.flush()


@pytest.fixture
def deployment(deployment_of: ByFamily, tmp_path: Path) -> Path:
    """Copy the deployment of the tiny klein, as `cp -rp` does, before its content was first read."""
    copy = Path(shutil.copytree(deployment_of("klein"), tmp_path / "deployment"))
    # other tests may have run a server on the original, which then has digests
    write_contents(copy, {name: replace(entry, digest="") for name, entry in read_contents(copy).items()})
    return copy


def read_all(deployment: Path) -> None:
    reader = Reader(deployment, check(deployment, verify(deployment)).pending)
    reader.wait()


def test_weights_are_read_once_in_the_background_and_not_again(deployment: Path) -> None:
    manifest = verify(deployment)
    first = check(deployment, manifest)
    assert (first.files, first.read, first.pending) == (4, 0, tuple(weight_files(manifest)))
    read_all(deployment)
    second = check(deployment, manifest)
    assert (second.files, second.read, second.pending) == (4, 0, ())
    known = read_contents(deployment)
    assert known[NAME] == replace(Content.of(deployment / NAME), digest=content_digest(deployment / NAME))
    assert sorted(path.name for path in deployment.glob("*content*")) == [CONTENTS]
    verify(deployment)
    check_out(deployment, DEPLOYMENT)  # such a deployment can be replaced


@pytest.mark.parametrize("keep_time", [False, True])
def test_changed_weights_are_rejected_by_name(deployment: Path, keep_time: bool) -> None:
    read_all(deployment)
    path = deployment / NAME
    stat = path.stat()
    negate(path.parent, "transformer_blocks.0.attn.to_q.weight")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + (0 if keep_time else 1)))
    manifest = verify(deployment)  # the header is the same
    if keep_time:
        assert check(deployment, manifest).read == 0, "only `full` sees a change that hides its time"
    with pytest.raises(ArtifactError, match=rf"{NAME}: its content differs .* run `serve repository` again, or delete"):
        check(deployment, manifest, "full" if keep_time else "quick")
    (deployment / CONTENTS).unlink()
    assert check(deployment, manifest, "full").read == 4, "the change was accepted"
    assert check(deployment, manifest).pending == ()


def test_a_copied_deployment_is_read_again_and_accepted(deployment: Path, tmp_path: Path) -> None:
    read_all(deployment)
    copy = Path(shutil.copytree(deployment, tmp_path / "copy"))
    assert check(copy, verify(copy)).read == 4
    assert check(copy, verify(copy)).read == 0


def test_a_change_before_the_first_read_is_a_warning(deployment: Path, caplog: pytest.LogCaptureFixture) -> None:
    check(deployment, verify(deployment), "full")
    raw = json.loads((deployment / CONTENTS).read_text())
    raw["files"][NAME] |= {"digest": "", "mtime_ns": 1}
    (deployment / CONTENTS).write_text(json.dumps(raw))
    assert check(deployment, verify(deployment)).pending == (NAME,)
    assert f"{NAME}: changed or copied since it was deployed" in caplog.text


def test_contents_of_another_manifest_are_ignored(deployment: Path) -> None:
    read_all(deployment)
    (deployment / MANIFEST).write_text((deployment / MANIFEST).read_text() + "\n")
    assert read_contents(deployment) == {}


@pytest.mark.parametrize("text", ["", "{", "[]", '{"manifest": 1}'])
def test_broken_contents_are_named(deployment: Path, text: str) -> None:
    (deployment / CONTENTS).write_text(text)
    if text.endswith("1}"):
        assert read_contents(deployment) == {}
        return
    with pytest.raises(ArtifactError, match=rf"{CONTENTS}: cannot be read .*; delete it, and it is made again"):
        check(deployment, verify(deployment))


def test_a_full_disk_is_a_warning(
    deployment: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = (deployment / CONTENTS).read_bytes()
    read_all(deployment)
    assert f"{CONTENTS}: cannot be written (No space left on device)" in caplog.text
    assert (deployment / CONTENTS).read_bytes() == before
    assert not list(deployment.glob("*.new"))


def test_a_read_only_deployment_is_a_warning(
    deployment: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    read_all(deployment)
    assert "is read-only: no digests of the weights can be kept" in caplog.text
    assert len(check(deployment, verify(deployment)).pending) == 4


def test_two_servers_do_not_read_the_same_weights(deployment: Path) -> None:
    other = os.open(deployment, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    read_all(deployment)
    assert len(check(deployment, verify(deployment)).pending) == 4
    os.close(other)
    read_all(deployment)
    assert check(deployment, verify(deployment)).pending == ()


def test_a_stopped_reader_keeps_what_it_finished(deployment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = tuple(weight_files(verify(deployment)))
    reader: Any = SimpleNamespace()
    digests = contents.content_digest

    def interrupted(path: Path, pause: Any) -> str:
        found = digests(path)
        if path == deployment / names[1]:
            reader.it._stop.set()
        return found

    monkeypatch.setattr(contents, "content_digest", interrupted)
    reader.it = Reader(deployment, ())
    reader.it._names = names
    reader.it._run()
    assert check(deployment, verify(deployment)).pending == names[1:]


def test_a_file_that_changes_while_it_is_read_is_not_recorded(
    deployment: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    digests = contents.content_digest

    def changing(path: Path, pause: Any) -> str:
        os.utime(path, ns=(1, 1))
        return digests(path)

    monkeypatch.setattr(contents, "content_digest", changing)
    Reader(deployment, (NAME,)).wait()
    assert read_contents(deployment)[NAME].digest == ""
    assert f"{NAME}: changed while the server runs" in caplog.text


def test_a_copy_shares_no_file_with_the_artifact_and_is_known_at_once(
    artifact_of: ByFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, out = artifact_of("klein"), tmp_path / "deployment"
    made = write_repository(artifact, out, Limits(), Tuning(), "none", copy=True, progress=CopyProgress().report)
    assert {path.stat().st_nlink for path in out.rglob("*") if path.is_file()} == {1}
    assert check(out, made).pending == ()
    assert read_contents(out)[NAME].digest == content_digest(artifact / "transformer" / Path(NAME).name)
    told = capsys.readouterr().err.splitlines()
    assert len(told) <= 11
    assert told[-1].startswith("copying: 100 % of ")


def test_a_copy_without_room_is_rejected_before_anything_is_written(
    artifact_of: ByFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=10))
    with pytest.raises(UsageError, match=r"--copy needs 0.0 GB in .*, which has 0.0 GB free; free some space"):
        write_repository(artifact_of("klein"), tmp_path / "out", Limits(), Tuning(), "none", copy=True)
    assert list(tmp_path.iterdir()) == []


class Served:
    """A client whose server generates with the weights of a deployment, in this process."""

    def __init__(self, deployment: Path) -> None:
        self.pipeline = LocalPipeline(deployment)

    def generate(self, fields: Any, timeout: float, cache: str) -> Any:
        return SimpleNamespace(images=[encode(self.pipeline.generate(fields).pixels[0], "png")], seconds=0.1)


@pytest.fixture(scope="module")
def sample_deployment(sample_artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("sample") / "deployment"
    write_repository(sample_artifact, out, Limits(), Tuning(), copy=True)
    yield out
    shutil.rmtree(out)


def blocks(deployment: Path) -> dict[str, str]:
    """Choose the first matrix of every block of the transformer."""
    found: dict[str, str] = {}
    for name, tensor in sorted(read_folder((deployment / NAME).parent).items()):
        if "transformer_blocks." in name and len(tensor.shape) == 2:
            found.setdefault(name.split(".")[0] + name.split(".")[1], name)
    return found


def test_the_known_answer_sees_100_negated_values_in_any_block(sample_deployment: Path) -> None:
    intact: Any = Served(sample_deployment)
    probe.probe(intact, sample_deployment)
    names = blocks(sample_deployment).values()
    assert len(names) == 6
    for name in names:
        negate((sample_deployment / NAME).parent, name)
        changed: Any = Served(sample_deployment)
        with pytest.raises(CheckFailed, match="the server's image differs from the known answer"):
            probe.probe(changed, sample_deployment)
        negate((sample_deployment / NAME).parent, name)


def test_on_another_cpu_small_differences_in_many_values_pass(deployment: Path) -> None:
    pixels = LocalPipeline(deployment).generate(probe.question(Limits())).pixels[0].copy()
    pixels[:8] ^= 1
    client: Any = SimpleNamespace(
        generate=lambda fields, timeout, cache: SimpleNamespace(images=[encode(pixels, "png")], seconds=0.1)
    )
    with pytest.raises(CheckFailed, match=r"in 12.5 % of its values \(allowed: 0.1 %.*were the weights changed"):
        probe.probe(client, deployment)
    raw = json.loads((deployment / MANIFEST).read_text())
    raw["options"]["known_answer"]["cpu"] = "another"
    (deployment / MANIFEST).write_text(json.dumps(raw))
    assert probe.made_on(read_manifest(deployment)) != probe.this_kind()
    assert probe.probe(client, deployment) == 0.1
