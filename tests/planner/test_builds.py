"""What a build of engines takes: the estimate holds for every build that was measured, and grows with what is built."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.compilers import WeightMode
from kit.recipes import RECIPES
from kit.variants import VARIANTS
from planner.builds import BASIS, MEASURED, NOT_TIMED, Estimate, Planned, estimate

SAVED = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "compile.json").read_text())["rows"]
BUILT = [row for row in SAVED if "seconds" in row and row["recipe"] in RECIPES]
KLEIN, FP8 = VARIANTS["klein-4b"], RECIPES["fp8"]


def test_the_measured_builds_are_those_that_the_benchmark_saved() -> None:
    saved = {(row["variant"], row["gpu"], row["recipe"], row["weights"], row["seconds"]) for row in BUILT}
    assert {(b.variant, b.gpu, b.recipe, b.weights, b.seconds) for b in MEASURED} == saved


@pytest.mark.parametrize("row", BUILT, ids=lambda row: f"{row['variant']}-{row['recipe']}-{row['weights']}")
def test_a_measured_build_lies_in_its_own_estimate(row: dict[str, object]) -> None:
    profiles = row["profiles"]
    assert isinstance(profiles, dict)
    parts = {part: Planned(1, count) for part, count in profiles.items()}
    variant, recipe, weights = VARIANTS[str(row["variant"])], RECIPES[str(row["recipe"])], row["weights"]
    found = estimate(variant, recipe, parts, weights, "tensorrt-rtx")  # type: ignore[arg-type]
    assert found.seconds is not None
    assert found.seconds[0] <= row["seconds"] <= found.seconds[1]  # type: ignore[operator]
    assert found.memory == pytest.approx(row["peak_rss_bytes"], rel=0.25)
    assert found.disk == pytest.approx(row["plan_bytes"], rel=0.3)


def build(weights: WeightMode = "plan", plans: int = 1, profiles: int = 5) -> Estimate:
    return estimate(KLEIN, FP8, {"transformer": Planned(plans, profiles)}, weights, "tensorrt-rtx")


def test_more_plans_take_more_disk_and_more_profiles_more_time() -> None:
    assert build(plans=5).disk > 4 * build().disk > 4 * build("stream").disk * 0.99
    assert build("inputs").disk == build("refit").disk < build().disk / 10
    few, many = build(profiles=1).seconds, build().seconds
    assert few is not None
    assert many is not None
    assert few[0] < many[0]


def test_tensorrt_on_the_gpu_has_no_estimate_of_time_and_says_so() -> None:
    found = estimate(KLEIN, FP8, {"transformer": Planned(1, 5)}, "plan", "tensorrt")
    assert found.seconds is None
    assert found.facts()["seconds"] is None
    assert found.describe().splitlines() == [
        "takes about: time unknown, 9.1 GB of memory, 4.1 GB of disk",
        f"  {BASIS}; {NOT_TIMED}",
    ]
    low, high = build().seconds or (0.0, 0.0)
    words = f"takes about: {low / 60:.2g} to {high / 60:.2g} minutes on 2 cores"
    assert build().describe().startswith(words)
