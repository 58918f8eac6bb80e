"""The time model: what limits it, and that the shipped calibration is the fit to the public points."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

import planner.data
from benchmarks import plan_fit
from kit.gpus import GPUS, gpu
from kit.recipes import RECIPES
from kit.variants import VARIANTS
from planner.measurements import measured_cells, measurements, split
from planner.memory import Shape
from planner.reference import FLUX1_DEV
from planner.speed import calibration, ceiling_seconds, predict
from planner.work import work

KLEIN = VARIANTS["klein-4b"]
STEP = work("transformer", KLEIN, RECIPES["bf16"], Shape(1024, 1024))


def test_the_shipped_calibration_is_what_the_fit_gives() -> None:
    fitted, _ = split(measurements())
    again = plan_fit.fit_centre(fitted)
    shipped = calibration()
    assert replace(again, low=shipped.low, high=shipped.high) == shipped


def test_held_out_points_are_met_within_the_bar() -> None:
    _, held = split(measurements())
    errors = [abs(predict(p, calibration()) / p.seconds - 1) for p in held]
    assert median(errors) <= 0.20
    raw = json.loads((Path(planner.data.__path__[0]) / "calibration.json").read_text())
    assert raw["held_out_median_error"] == pytest.approx(median(errors), abs=1e-4)
    assert raw["held_out_points"] == len(held)


def test_no_gpu_is_predicted_faster_than_its_dense_rate() -> None:
    for card in GPUS.values():
        for name, recipe in RECIPES.items():
            if card.refusal(name) is None:
                done = work("transformer", KLEIN, recipe, Shape(1024, 1024))
                for stack in ("eager", "fused", "tensorrt"):
                    assert calibration().seconds(done, card, recipe, stack) > ceiling_seconds(done, card, recipe)


def test_a_small_board_is_bound_by_its_power() -> None:
    l4, model = gpu("l4"), calibration()
    assert model.rate(l4, "bf16") < 0.5 * l4.dense["bf16"]
    assert model.rate(replace(l4, watts=2 * l4.watts), "bf16") == pytest.approx(2 * model.rate(l4, "bf16"))


def test_eager_takes_longer_than_fused_and_tensorrt_as_long_as_it_was_measured() -> None:
    model, bf16 = calibration(), RECIPES["bf16"]
    eager, fused, tensorrt = (model.seconds(STEP, gpu("h100"), bf16, s) for s in ("eager", "fused", "tensorrt"))
    assert eager > fused
    assert tensorrt / fused == pytest.approx(model.tensorrt)
    assert model.tensorrt == pytest.approx(0.211 / 0.185, rel=0.01)  # GB300, TensorRT-Model-Connect


def test_a_batch_takes_as_long_as_its_images_when_operations_bind() -> None:
    two = work("transformer", KLEIN, RECIPES["bf16"], Shape(1024, 1024, 2))
    model, h100 = calibration(), gpu("h100")
    one = model.seconds(STEP, h100, RECIPES["bf16"], "fused")
    assert model.seconds(two, h100, RECIPES["bf16"], "fused") == pytest.approx(2 * one, rel=1e-3)


def test_guidance_doubles_the_work() -> None:
    base = work("transformer", VARIANTS["klein-base-4b"], RECIPES["bf16"], Shape(1024, 1024))
    assert base.flops == 2 * STEP.flops
    assert base.weight_bytes == STEP.weight_bytes


def test_flux1_takes_the_operations_that_it_is_known_to_take() -> None:
    step = work("transformer", FLUX1_DEV, RECIPES["bf16"], Shape(1024, 1024))
    assert step.flops / 1e12 == pytest.approx(74.4, abs=0.2)


def test_int8_on_ampere_has_not_been_measured_in_public() -> None:
    assert ("ampere", "8 bits") not in measured_cells()
    assert ("hopper", "8 bits") in measured_cells()


def test_the_range_holds_most_of_the_held_out_points() -> None:
    _, held = split(measurements())
    model = calibration()
    inside = [model.low <= p.seconds / predict(p, model) <= model.high for p in held]
    assert sum(inside) >= 0.6 * len(held)
