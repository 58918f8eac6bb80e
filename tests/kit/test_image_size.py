"""One rule of image sizes, that requests, plans, engines and packages are held to."""

from __future__ import annotations

import pytest

from kit.image_size import MAX_TOKENS, MIN_TOKENS, side_problem, size_problem
from kit.variants import VARIANTS
from pipeline.request import Limits
from runtimes.trt.profiles import Sizing


@pytest.mark.parametrize(
    ("side", "problem"),
    [
        (64, None),
        (1360, None),
        (2048, None),
        (48, "48 is not between 64 and 2048 pixels"),
        (4096, "4096 is not between 64 and 2048 pixels"),
        (100, "100 is not a multiple of 16; nearest: 96 or 112"),
    ],
)
def test_a_side_is_a_multiple_of_16_from_64_to_2048(side: int, problem: str | None) -> None:
    assert side_problem(side) == problem


def test_the_smallest_and_the_largest_square_are_the_bounds_in_tokens() -> None:
    variant = VARIANTS["klein-4b"]
    assert (variant.tokens(64, 64), variant.tokens(2048, 2048)) == (MIN_TOKENS, MAX_TOKENS)
    assert size_problem(64, 64) is None
    assert size_problem(2048, 2048) is None
    assert size_problem(2064, 2048) == (
        "2064x2048 has 16512 image tokens, the profiles accept 16 to 16384; nearest: 2048x2048"
    )


def test_requests_and_engines_have_the_bounds_of_the_rule_by_default() -> None:
    assert side_problem(Limits().min_side) is side_problem(Limits().max_side) is None
    assert (Limits().min_side, Limits().max_side) == (Sizing().min_side, Sizing().sides[-1])
