"""Intervals cover the true mean as often as stated, keep a prompt's seeds together, and allow for unseen losses."""

from __future__ import annotations

import numpy as np
import pytest

from quantize.gate.intervals import interval


def test_intervals_cover_the_true_mean_about_95_times_in_100() -> None:
    """The values are skewed, and seeds of one prompt are strongly correlated."""
    rng = np.random.default_rng(3)
    truth, covered, rounds = 0.5 + 1.0, 0, 200
    for _ in range(rounds):
        of_prompt = rng.gamma(2.0, 0.5, size=(60, 1))  # mean 1
        found = interval((0.5 + of_prompt + rng.normal(0, 0.1, size=(60, 3))).tolist(), resamples=400)
        covered += found.low <= truth <= found.high
    assert 0.91 <= covered / rounds <= 0.99


def test_more_seeds_of_the_same_prompts_do_not_count_as_more_prompts() -> None:
    rng = np.random.default_rng(5)
    of_prompt = rng.normal(0, 1, size=(40, 1))
    one, nine = interval(of_prompt.tolist()), interval(np.repeat(of_prompt, 9, axis=1).tolist())
    assert (nine.low, nine.high) == pytest.approx((one.low, one.high), abs=1e-9)
    assert (one.prompts, one.drawings, nine.prompts, nine.drawings) == (40, 40, 40, 360)


def test_for_symmetric_values_the_interval_matches_normal_theory() -> None:
    values = np.random.default_rng(1).normal(10, 2, size=(400, 1))
    found = interval(values.tolist())
    half = 1.96 * values.std() / 20
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_answers_that_never_change_get_the_rule_of_three() -> None:
    found = interval([[0.0]] * 100, grain=0.5)
    assert (found.mean, found.low, found.high) == pytest.approx((0.0, -0.015, 0.015))


def test_a_gain_does_not_rule_out_losses() -> None:
    found = interval([[0.0]] * 99 + [[1.0]], grain=1.0)
    assert found.low == pytest.approx(0.01 - 0.03)
    assert found.high > 0.01


def test_rare_losses_are_covered_too() -> None:
    """Two of a hundred lose: one sample in eight contains none of them."""
    rng, covered, rounds = np.random.default_rng(8), 0, 200
    for _ in range(rounds):
        found = interval((-(rng.random((100, 1)) < 0.02).astype(float)).tolist(), grain=1.0, resamples=400)
        covered += found.low <= -0.02
    assert covered / rounds >= 0.93


def test_a_measured_value_that_never_varies_has_no_width() -> None:
    assert (interval([[0.25, 0.25]] * 8).low, interval([[0.25, 0.25]] * 8).high) == (0.25, 0.25)
    assert interval([[3.0]]).high == 3.0


def test_the_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(2).normal(size=(30, 2)).tolist()
    assert interval(values) == interval(values)


def test_two_values_still_give_finite_ends() -> None:
    found = interval([[0.0], [1.0]], resamples=200)
    assert 0 <= found.low <= 0.5 <= found.high <= 1
