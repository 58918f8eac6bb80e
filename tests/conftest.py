"""What several rooms' tests share: tiny checkpoints of each family and their exports."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for a network; read when huggingface_hub is imported

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kit.variants import Family

ByFamily = Callable[["Family"], Path]  # fixtures import what they need when they run: a room's tests load no other room


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> ByFamily:
    """Make the tiny checkpoint of a family once."""
    from kit import tiny

    @cache
    def make(family: Family) -> Path:
        return tiny.save(tmp_path_factory.mktemp("checkpoints") / family, tiny.Tiny(family))

    return make


@pytest.fixture(scope="session")
def artifact_of(checkpoint_of: ByFamily, tmp_path_factory: pytest.TempPathFactory) -> ByFamily:
    """Export the tiny checkpoint of a family once, all parts, fp32."""
    from export.artifact import ExportConfig, export

    @cache
    def make(family: Family) -> Path:
        out = tmp_path_factory.mktemp("artifacts") / family
        export(checkpoint_of(family), out, ExportConfig())
        return out

    return make


@pytest.fixture(scope="session")
def sample_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the checkpoint that ships with the kit once, all parts, fp32."""
    from export.artifact import ExportConfig, export
    from kit.checkpoint import resolve

    out = tmp_path_factory.mktemp("artifacts") / "sample"
    export(resolve("sample"), out, ExportConfig())
    return out


@pytest.fixture(scope="session")
def sample_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrate the checkpoint that ships with the kit once; on too few scenes, what was not seen is clipped."""
    from kit.checkpoint import resolve
    from quantize import prompt_set
    from quantize.calibration import record
    from quantize.calibration.calibrate import Calibration, calibrate

    path = tmp_path_factory.mktemp("records") / "sample.json"
    record.write(calibrate(resolve("sample"), Calibration(prompt_set.load("sample:24:7"), dtype="fp32", batch=8)), path)
    return path


@pytest.fixture(scope="session")
def quantized_of(
    sample_artifact: Path, sample_record: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Quantize the sample by a recipe once."""
    from kit.recipes import find_recipe
    from quantize.apply.apply import apply
    from quantize.calibration import record

    @cache
    def make(recipe: str) -> Path:
        out = tmp_path_factory.mktemp("quantized") / recipe
        apply(sample_artifact, out, find_recipe(recipe), record.read(sample_record))
        return out

    return make
