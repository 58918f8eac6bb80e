"""What the tests of several rooms share: tiny checkpoints of each family, their exports, and the quantized sample.

Fixtures import what they need when they run, so that the tests of a room load no other room. What takes long to make is
made once per test run, also when pytest-xdist runs several processes.
"""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may use the network; read when huggingface_hub is imported
if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core: threads of two processes would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kit.variants import Family

ByFamily = Callable[["Family"], Path]
Once = Callable[[str, Callable[[Path], object]], Path]  # (path below the folder of the run, maker) -> where it is


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a file or folder once per test run: the process that comes first makes it, the others wait for it."""
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shared"

    def make(name: str, maker: Callable[[Path], object]) -> Path:
        target, done = root / name, root / f"{name}.done"
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name.replace('/', '-')}.lock"):
            if not done.exists():
                maker(target)
                done.touch()
        return target

    return make


@pytest.fixture(scope="session")
def checkpoint_of(once: Once) -> ByFamily:
    """Make the tiny checkpoint of a family."""

    @cache
    def make(family: Family) -> Path:
        from kit import tiny

        return once(f"checkpoints/{family}", lambda out: tiny.save(out, tiny.Tiny(family)))

    return make


@pytest.fixture(scope="session")
def artifact_of(checkpoint_of: ByFamily, once: Once) -> ByFamily:
    """Export the tiny checkpoint of a family, all parts, fp32."""

    @cache
    def make(family: Family) -> Path:
        from export.artifact import ExportConfig, export

        return once(f"artifacts/{family}", lambda out: export(checkpoint_of(family), out, ExportConfig()))

    return make


@pytest.fixture(scope="session")
def sample_artifact(once: Once) -> Path:
    """Export the checkpoint that ships with the kit, all parts, fp32."""
    from export.artifact import ExportConfig, export
    from kit.checkpoint import resolve

    return once("artifacts/sample", lambda out: export(resolve("sample"), out, ExportConfig()))


@pytest.fixture(scope="session")
def sample_record(once: Once) -> Path:
    """Calibrate the checkpoint that ships with the kit, on enough scenes that few activations are clipped."""

    def make(path: Path) -> None:
        from kit.checkpoint import resolve
        from quantize import prompt_set
        from quantize.calibration import record
        from quantize.calibration.calibrate import Calibration, calibrate

        config = Calibration(prompt_set.load("sample:64:7"), dtype="fp32", batch=8)
        record.write(calibrate(resolve("sample"), config), path)

    return once("records/sample.json", make)


@pytest.fixture(scope="session")
def quantized_of(sample_artifact: Path, sample_record: Path, once: Once) -> Callable[[str], Path]:
    """Quantize the sample by a recipe."""

    @cache
    def make(recipe: str) -> Path:
        from kit.recipes import find_recipe
        from quantize.apply.apply import apply
        from quantize.calibration import record

        seen = record.read(sample_record)
        return once(f"quantized/{recipe}", lambda out: apply(sample_artifact, out, find_recipe(recipe), seen))

    return make
