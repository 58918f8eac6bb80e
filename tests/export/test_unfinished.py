"""An export that is killed or runs out of disk space leaves nothing that a later step accepts as an artifact."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kit import tiny
from kit.artifact import MANIFEST, verify
from kit.errors import Flux2Error

EXPORT = [sys.executable, "-m", "export", "onnx"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("unfinished") / "checkpoint", tiny.Tiny(text_tokens=64))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    module = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    save_file({f"{module}.lora_A.weight": torch.ones(1, 64), f"{module}.lora_B.weight": torch.ones(576, 1)}, file)
    return file


def accepted(folder: Path) -> bool:
    """Return whether a later step would accept a folder."""
    try:
        verify(folder)
    except Flux2Error:
        return False
    return True


def content(folder: Path) -> dict[str, bytes]:
    """Read every file of an artifact."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_at_any_event_it_leaves_nothing_or_the_whole(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    seed = str(random.randrange(10**6))
    command = [sys.executable, "-m", "tests.export.killed_export", str(checkpoint), str(adapter), str(tmp_path), seed]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["events"] > 15  # folders, links, graphs, the merged weight, text files, the manifest, the rename
    assert facts["ends"] == [-signal.SIGKILL] * facts["events"]
    whole = content(tmp_path / "whole" / "out")
    left = 0
    for place in tmp_path.iterdir():
        folders = [path for path in place.rglob("*") if path.is_dir()]
        left += sum((folder / MANIFEST).exists() for folder in folders)
        for folder in folders:
            if accepted(folder):
                assert content(folder) == whole, folder
    assert left > 1  # some were killed after the manifest was written


def test_the_command_killed_at_a_random_moment_over_an_older_artifact(checkpoint: Path, tmp_path: Path) -> None:
    """Either the old or the new artifact is complete, and the next export succeeds."""
    out = tmp_path / "out"
    command = [*EXPORT, str(checkpoint), "--parts", "vae_decoder", "--out", str(out)]
    begin = time.monotonic()
    subprocess.run([*command, "--attention", "op"], check=True, capture_output=True, timeout=120)
    seconds = time.monotonic() - begin
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(seconds / 3, seconds))
        process.kill()
        process.wait()
        folders = [path for path in tmp_path.rglob("*") if path.is_dir()]
        for folder in filter(accepted, folders):
            assert set(verify(folder).parts) == {"vae_decoder"}
            assert folder == out or folder.name.startswith(".out.unfinished-") or folder.name == "artifact"
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert verify(out).options["attention"] == "matmul"


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 600 KB, which requires root."""
    folder = tmp_path / "little"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system requires root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def assert_one_clear_sentence(done: subprocess.CompletedProcess[str], sentence: str) -> None:
    assert done.returncode == 2
    assert done.stderr.strip() == f"error: {sentence}"
    assert json.loads(done.stdout.splitlines()[-1]) == {"error": sentence, "exit_code": 2}


def test_a_full_disk_is_told_in_one_sentence(checkpoint: Path, little_disk: Path) -> None:
    """Hard links to another file system are impossible, so the weights are copied and do not fit."""
    out = little_disk / "out"
    command = [*EXPORT, str(checkpoint), "--parts", "vae_decoder", "--out", str(out), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert_one_clear_sentence(
        done,
        f"cannot write {out}: No space left on device (vae_decoder/diffusion_pytorch_model.safetensors); free some "
        "space or choose another --out",
    )
    assert list(little_disk.iterdir()) == []


def test_a_merged_weight_that_must_not_grow_is_told_in_one_sentence(
    checkpoint: Path, adapter: Path, tmp_path: Path
) -> None:
    """A quota that is exceeded in the middle of a file."""
    out = tmp_path / "out"
    argv = ["--parts", "transformer", "--lora", str(adapter), "--out", str(out), "--json"]
    command = [*EXPORT, str(checkpoint), *argv]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))

    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=False, preexec_fn=limit, env=environment
    )
    assert_one_clear_sentence(done, f"cannot write {out}: File too large")
    assert list(tmp_path.iterdir()) == []
