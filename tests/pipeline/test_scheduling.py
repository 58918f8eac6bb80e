"""Which requests share an engine call: simulated engines, no threads."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from pipeline.scheduling import CACHED_SHARE, PATIENCE, SHAPES, SHORT, CallCosts, Scheduler, Shape
from planner import queueing

Cost = Callable[[int, int], float]  # seconds of a call by tokens and rows


def cpu(tokens: int, rows: int) -> float:
    return 0.001 + 1e-4 * tokens * rows


def gpu(tokens: int, rows: int) -> float:
    return 0.01 + 1e-7 * tokens * rows


@dataclass(eq=False)
class Fake:
    steps_left: int
    tokens: int = 64
    rows: int = 1
    batch: bool = False
    done: float = -1.0
    cached: int = 0

    @property
    def shape(self) -> Shape:
        return self.tokens, self.cached


def simulate(jobs: list[tuple[float, Fake]], cost: Cost, max_rows: int = 16) -> float:
    """Run jobs that arrive at given seconds until all are done; returns the last second."""
    scheduler, now = Scheduler(max_rows), 0.0
    live: list[Fake] = []
    coming = sorted(jobs, key=lambda pair: pair[0])
    while coming or live:
        if not live:
            now = max(now, coming[0][0])
        while coming and coming[0][0] <= now:
            live.append(coming.pop(0)[1])
        chosen = scheduler.choose(live)
        assert len({live[i].shape for i in chosen}) == 1
        assert sum(live[i].rows for i in chosen) <= max(max_rows, live[chosen[0]].rows)
        seconds = cost(live[chosen[0]].tokens, sum(live[i].rows for i in chosen))
        now += seconds
        scheduler.ran(live, chosen, seconds)
        for i in chosen:
            live[i].steps_left -= 1
            if not live[i].steps_left:
                live[i].done = now
                scheduler.forget(live[i])
        live = [job for job in live if job.steps_left]
    return now


def test_a_short_request_overtakes_long_ones_where_sharing_saves_nothing() -> None:
    long = [(0.0, Fake(28)) for _ in range(4)]
    short = Fake(4)
    simulate([*long, (0.1, short)], cpu)
    # its four steps, at most one debt, and the call that was running when it came
    assert short.done - 0.1 <= (4 + 1 + SHORT) * cpu(64, 1)
    assert short.done < min(job.done for _, job in long)


def test_all_share_a_call_where_rows_are_almost_free() -> None:
    jobs = [(0.0, Fake(steps)) for steps in (4, 28, 8, 50)]
    warm = [(0.0, Fake(60)) for _ in range(4)]
    assert simulate(warm + jobs, gpu) < 1.2 * 60 * gpu(64, 8)


@pytest.mark.parametrize("cost", [cpu, gpu], ids=["cpu", "gpu"])
def test_nobody_starves_under_a_stream_of_short_requests(cost: Cost) -> None:
    """The bound of the module's docstring, with the most requests that were live at a time."""
    alone = 28 * cost(64, 1)
    long = Fake(28)
    gap = 4 * cost(64, 1) * 1.02  # short requests alone would keep the engine busy
    jobs = [(0.0, long), *((n * gap, Fake(4)) for n in range(600))]
    simulate(jobs, cost)
    assert long.done <= 3 * PATIENCE * alone + cost(64, 16)


def test_a_batch_request_waits_for_interactive_ones_but_not_for_ever() -> None:
    batch = [Fake(4, batch=True) for _ in range(3)]
    interactive = [Fake(20) for _ in range(3)]
    simulate([(0.0, job) for job in (*batch, *interactive)], cpu)
    assert max(job.done for job in interactive) < max(job.done for job in batch)
    assert all(job.done > 0 for job in batch)


def test_requests_of_other_sizes_do_not_share_a_call() -> None:
    jobs = [(0.0, Fake(4, tokens)) for tokens in (16, 64, 256, 64)]
    simulate(jobs, gpu)  # asserted in simulate
    assert all(job.done > 0 for _, job in jobs)


def test_requests_with_and_without_cached_references_do_not_share_a_call() -> None:
    jobs = [(0.0, Fake(4, cached=cached)) for cached in (0, 16, 32, 16, 0)]
    simulate(jobs, gpu)  # asserted in simulate
    assert all(job.done > 0 for _, job in jobs)


def test_a_request_with_references_costs_as_much_as_its_tokens_say() -> None:
    """Of two requests with as many steps left, the one with fewer tokens to compute goes first."""
    plain, cached, joined = Fake(4, 64), Fake(4, 64, cached=64), Fake(4, 128)
    scheduler = Scheduler(16)
    assert scheduler.choose([joined, cached, plain]) == [2]
    assert scheduler.choose([joined, cached]) == [1]
    assert scheduler.work(cached) == (1 + CACHED_SHARE) * scheduler.work(plain)
    assert scheduler.work(joined) == 2 * scheduler.work(plain)


def test_a_request_with_more_rows_than_a_call_may_have_runs_alone() -> None:
    wide = Fake(3, rows=20)
    simulate([(0.0, wide), (0.0, Fake(3))], gpu, max_rows=16)
    assert wide.done > 0


def test_random_loads_end_and_lose_no_work() -> None:
    chance = random.Random(5)
    for _ in range(30):
        jobs = [
            (chance.random(), Fake(chance.randint(1, 30), chance.choice((16, 64, 256)), chance.randint(1, 4)))
            for _ in range(20)
        ]
        work = sum(job.steps_left * cpu(job.tokens, job.rows) for _, job in jobs)
        assert simulate(jobs, cpu) <= work + 1.0


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("cost", [cpu, gpu])
def test_the_planner_predicts_how_long_this_scheduler_takes(cost: Cost, load: float) -> None:
    alone, step = 4 * cost(64, 1), cost(64, 1)
    gains = [n * step / cost(64, n) for n in range(1, 17)]
    chance, clock, jobs = random.Random(5), 0.0, []
    for _ in range(3000):
        clock += chance.expovariate(load * max(gains) / alone)
        jobs.append((clock, Fake(4)))
    simulate(jobs, cost)
    seen = sorted(job.done - at for at, job in jobs)
    predicted = sorted(queueing.replay([(at, alone) for at, _ in jobs], gains, step=step))
    assert sum(predicted) == pytest.approx(sum(seen), rel=0.10)
    assert predicted[2850] == pytest.approx(seen[2850], rel=0.20)


def test_first_come_advances_the_oldest_and_all_that_fit_beside_it() -> None:
    jobs = [Fake(9), Fake(2, tokens=16), Fake(1), Fake(1, rows=15), Fake(1, rows=14)]
    assert Scheduler(16, "first-come").choose(jobs) == [0, 2, 4]


def test_whole_requests_let_nobody_join_until_all_that_started_together_are_done() -> None:
    scheduler = Scheduler(16, "whole-request")
    first, second, late = Fake(2), Fake(1), Fake(1)
    assert scheduler.choose([first, second]) == [0, 1]
    scheduler.forget(second)  # done
    assert scheduler.choose([first, late]) == [0]
    scheduler.forget(first)
    assert scheduler.choose([late]) == [0]


def test_one_at_a_time_advances_the_oldest_alone() -> None:
    assert Scheduler(16, "one-at-a-time").choose([Fake(28), Fake(1)]) == [0]


def test_costs_are_learned_and_scaled_from_the_nearest_size() -> None:
    costs = CallCosts()
    assert costs.seconds((64, 0), 2) / costs.seconds((64, 0), 1) == 2
    costs.observe((64, 0), 1, 0.1)
    costs.observe((64, 0), 4, 0.2)
    assert costs.seconds((64, 0), 1) == pytest.approx(0.1)
    assert 0.1 < costs.seconds((64, 0), 2) < 0.2
    assert costs.seconds((128, 0), 1) == pytest.approx(0.2)
    costs.observe((64, 0), 1, 0.2)
    assert 0.1 < costs.seconds((64, 0), 1) < 0.2


def test_costs_of_the_latest_shapes_are_remembered() -> None:
    costs = CallCosts()
    for tokens in range(1, SHAPES + 10):
        costs.observe((tokens, 0), 1, float(tokens))
        costs.observe((1, 0), 1, 1.0)
    assert len(costs.seen) == SHAPES
    assert {(1, 0), (SHAPES + 9, 0)} < set(costs.seen)


def pairs(tokens: int, rows: int) -> float:
    """An engine that runs two rows side by side."""
    return 1e-4 * tokens * ((rows + 1) // 2)


def test_a_call_is_no_wider_than_makes_its_rows_cheaper() -> None:
    scheduler = Scheduler(16)
    jobs = [Fake(1000) for _ in range(12)]

    def widths(cost: Cost, calls: int) -> list[int]:
        found = []
        for _ in range(calls):
            chosen = scheduler.choose(jobs)
            found.append(len(chosen))
            scheduler.ran(jobs, chosen, cost(64, len(chosen)))
        return found

    of_pairs = widths(pairs, 200)
    assert sum(width == 2 for width in of_pairs[20:]) > 0.95 * len(of_pairs[20:])
    assert min(widths(gpu, 2000)[-20:]) >= 8, "the engine has become one that rows cost nothing"
