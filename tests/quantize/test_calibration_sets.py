"""How far images in int8 depend on which prompts were used for calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kit.checkpoint import resolve
from kit.recipes import RECIPES
from quantize import prompt_set
from quantize.apply.apply import apply
from quantize.calibration import record
from quantize.calibration.calibrate import Calibration, calibrate
from quantize.calibration.command import FEW
from quantize.gate.drawing import Canvas, open_generator
from quantize.gate.side_by_side import CALIBRATIONS
from quantize.gate.similarity import Pixels, psnr

PROMPTS = prompt_set.load("sample:24").prompts


def images(artifact: Path) -> list[Pixels]:
    generate = open_generator(artifact, Canvas())
    return [generate(prompt.text, seed).pixels for seed, prompt in enumerate(PROMPTS)]


def test_two_sets_of_enough_prompts_give_the_same_quality_within_the_tolerance(
    sample_artifact: Path, sample_record: Path, quantized_of: Callable[[str], Path], tmp_path: Path
) -> None:
    (run,) = record.read(sample_record).runs
    assert run["prompts"]["count"] == FEW
    other = prompt_set.load(f"sample:{FEW}:8")
    assert other.digest != run["prompts"]["digest"]
    apply(
        sample_artifact,
        tmp_path / "other",
        RECIPES["int8"],
        calibrate(resolve("sample"), Calibration(other, dtype="fp32", batch=8)),
    )
    reference = images(sample_artifact)
    quality = [
        float(np.mean([psnr(before, after) for before, after in zip(reference, images(artifact), strict=True)]))
        for artifact in (quantized_of("int8"), tmp_path / "other")
    ]
    assert quality[0] == pytest.approx(quality[1], abs=CALIBRATIONS), quality
    assert min(quality) > 52.0, quality
