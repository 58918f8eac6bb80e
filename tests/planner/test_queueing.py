"""The simulated queue matches the cases that are known in closed form."""

from __future__ import annotations

import pytest

from planner.queueing import simulate


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_slot_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    found = simulate(load, [1.0], 1.0)
    assert found is not None
    assert found.mean == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_many_slots_share_as_processor_sharing_says(load: float) -> None:
    found = simulate(load, [1.0] * 300, 1.0)
    assert found is not None
    assert found.mean == pytest.approx(1 / (1 - load), rel=0.05)


def test_an_idle_replica_takes_what_one_image_takes() -> None:
    found = simulate(0.001, [1.0], 2.0)
    assert found is not None
    assert found.p50 == pytest.approx(2.0)
    assert found.p95 == pytest.approx(2.0, rel=0.01)


def test_too_much_is_refused() -> None:
    assert simulate(1.01, [1.0], 1.0) is None
    assert simulate(1.5, [1.0], 1.0, replicas=2) is not None


def test_batches_that_gain_carry_more() -> None:
    assert simulate(1.5, [1.0, 1.0], 1.0) is None
    found = simulate(1.5, [1.0, 2.0], 1.0)
    assert found is not None
    assert found.load == pytest.approx(0.75)


def test_two_replicas_wait_less_than_one_at_the_same_load() -> None:
    one, two = simulate(0.8, [1.0], 1.0), simulate(1.6, [1.0], 1.0, replicas=2)
    assert one is not None
    assert two is not None
    assert two.p95 < one.p95


def test_the_same_question_has_the_same_answer() -> None:
    assert simulate(0.7, [1.0] * 4, 1.0) == simulate(0.7, [1.0] * 4, 1.0)
