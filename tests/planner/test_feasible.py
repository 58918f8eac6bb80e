"""A build that cannot succeed is rejected before it starts, with the nearest setting that would work."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from kit.gpus import GB, GPUS, gpu
from kit.image_size import size_problem
from kit.variants import VARIANTS
from planner.feasible import Build, needed_bytes, refusal
from planner.memory import usable_bytes

KLEIN, DEV = VARIANTS["klein-4b"], VARIANTS["dev"]


def test_klein_4b_builds_with_the_default_recipe_on_every_gpu_with_bf16() -> None:
    for card in GPUS.values():
        refused = refusal(Build(KLEIN, card.default_recipe, card))
        assert refused is None or (not card.has("bf16") and "in fp32 needs" in refused)


def test_fp8_without_fp8_units_is_refused() -> None:
    assert refusal(Build(KLEIN, "fp8", gpu("a10g"))) == (
        "fp8 needs compute capability 8.9 or newer; a10g has 8.6: use --recipe int8"
    )


def test_too_little_memory_names_a_recipe_and_streaming() -> None:
    assert refusal(Build(DEV, "fp8", gpu("l4"))) == (
        "the transformer of dev in fp8 needs 34.0 GB at 4096 image tokens, batch 1; l4 has 22.4 GB available: "
        "use --recipe int4-weights or stream the weights from host memory"
    )


def test_too_large_a_batch_names_the_largest_that_fits() -> None:
    build = Build(DEV, "int4-weights", gpu("l4"), batch=8)
    message = refusal(build)
    assert message is not None
    assert ": use batch 3 or" in message
    assert refusal(replace(build, batch=3)) is None
    assert needed_bytes(replace(build, batch=4)) > usable_bytes(build.gpu)


def test_every_setting_that_a_refusal_names_works() -> None:
    build = Build(DEV, "bf16", gpu("a100-40g"), max_tokens=16384, batch=4)
    message = refusal(build)
    assert message is not None
    assert "use --recipe int4-weights" in message
    assert refusal(replace(build, recipe="int4-weights")) is None
    assert "stream the weights" in message
    assert refusal(replace(build, weight_streaming=True)) is None


def test_nothing_fits_says_so() -> None:
    tiny = replace(gpu("l4"), memory_bytes=2 * GB)
    assert "no recipe or size makes it fit: use a larger --gpu" in str(
        refusal(Build(DEV, "bf16", tiny, weight_streaming=True, batch=2, min_tokens=4096, max_tokens=16384))
    )


def test_a_full_disk_names_stripped_plans() -> None:
    build = Build(KLEIN, "bf16", gpu("l4"), disk_free=1 * GB)
    assert refusal(build) == (
        "the plans take about 14.8 GB and 1.0 GB of disk space are free: "
        "use stripped plans (they hold no weights) or another --out"
    )
    assert refusal(replace(build, stripped=True)) is None
    assert "use another --out" in str(refusal(replace(build, stripped=True, disk_free=10**7)))


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (256, 65536, "exceeds the model family's limit of 4 megapixels; nearest: 16384 (2048x2048)"),
        (4096, 256, "a profile of 4096 to 256 image tokens is empty"),
        (0, 256, "a profile of 0 to 256 image tokens is empty"),
    ],
)
def test_impossible_profiles_are_refused(low: int, high: int, message: str) -> None:
    assert message in str(refusal(Build(KLEIN, "fp8", gpu("l4"), min_tokens=low, max_tokens=high)))


def test_a_batch_below_one_is_refused() -> None:
    assert refusal(Build(KLEIN, "fp8", gpu("l4"), batch=0)) == "batch 0: must be at least 1"


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((3072, 3072), "3072x3072 has 36864 image tokens, the profiles accept 256 to 4096; nearest: 1024x1024"),
        ((4096, 512), "4096x512 has 8192 image tokens, the profiles accept 256 to 4096; nearest: 2880x352"),
        ((128, 128), "128x128 has 64 image tokens, the profiles accept 256 to 4096; nearest: 256x256"),
        ((1000, 1024), "1000x1024: sides must be multiples of 16; nearest: 992x1024"),
    ],
)
def test_a_size_outside_the_profiles_names_the_nearest_inside(size: tuple[int, int], message: str) -> None:
    assert size_problem(*size, 256, 4096) == message


def test_a_size_inside_the_profiles_passes() -> None:
    assert size_problem(1360, 768, 256, 4096) is None


def test_a_refusal_takes_no_time() -> None:
    begin = time.perf_counter()
    for _ in range(100):
        refusal(Build(DEV, "bf16", gpu("l4"), batch=8, max_tokens=16384))
    assert time.perf_counter() - begin < 2
