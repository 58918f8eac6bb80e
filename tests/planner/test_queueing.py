"""The simulated queue matches the cases that are known in closed form."""

from __future__ import annotations

import math
import random

import pytest

from planner.queueing import WARM_UP, replay, simulate, slots


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_slot_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    found = simulate(load, [1.0], 1.0)
    assert found is not None
    assert found.mean == pytest.approx(1 + load / (2 * (1 - load)), rel=0.05)


@pytest.mark.parametrize("rate", [0.5, 1.5, 3.0])
def test_requests_that_gain_share_as_processor_sharing_with_a_varying_rate_says(rate: float) -> None:
    """Its distribution of n is that of a birth-death chain, for any distribution of work (Cohen, 1979)."""
    gains = [1 + 0.5 * n for n in range(60)]
    weights = [rate**n / math.prod(gains[:n]) for n in range(60)]
    mean = sum(n * weight for n, weight in enumerate(weights)) / sum(weights) / rate
    found = simulate(rate, gains, 1.0)
    assert found is not None
    assert found.mean == pytest.approx(mean, rel=0.05)


def test_no_more_requests_share_than_gain_from_it() -> None:
    assert slots([1.0] * 8) == 1
    assert slots([1.0, 1.8, 1.85, 1.9]) == 2
    assert slots([1.0, 1.5, 2.0, 2.5]) == 4
    arrivals = poisson(0.8)
    assert replay(arrivals, [1.0] * 8) == replay(arrivals, [1.0])


def test_short_requests_go_before_long_ones_as_preemptive_priorities_say() -> None:
    short, long, rate = 0.02, 1.0, 0.7  # requests per second, half of each
    chance = random.Random(3)
    arrivals = [(at, chance.choice((short, long))) for at, _ in poisson(rate)]
    found = list(zip(replay(arrivals, [1.0]), arrivals, strict=True))[WARM_UP:]
    took = {size: [seconds for seconds, (_, work) in found if work == size] for size in (short, long)}
    mean = {size: sum(seconds) / len(seconds) for size, seconds in took.items()}
    busy = {size: rate / 2 * size for size in (short, long)}
    second_moment = rate / 2 * (short**2 + long**2)
    late = long / (1 - busy[short]) + second_moment / 2 / (1 - busy[short]) / (1 - busy[short] - busy[long])
    assert mean[short] == pytest.approx(short, rel=0.05)
    assert mean[long] == pytest.approx(late, rel=0.05)


def test_a_request_waits_for_the_end_of_the_running_step() -> None:
    without, with_step = (replay(poisson(0.5), [1.0, 2.0, 4.0], step=step) for step in (0.0, 0.25))
    added = [b - a for a, b in zip(without, with_step, strict=True)]
    assert min(added) >= 0
    assert 0 < max(added) < 0.25


def poisson(rate: float, count: int = 20_000) -> list[tuple[float, float]]:
    chance, clock, arrivals = random.Random(2), 0.0, []
    for _ in range(count):
        clock += chance.expovariate(rate)
        arrivals.append((clock, 1.0))
    return arrivals


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
