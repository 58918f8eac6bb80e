"""Which groups the search spares: the ladder, bisection, bounds, and the check of the predicted order."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from kit.errors import UsageError
from kit.recipes import KEEP, RECIPES
from quantize.gate.contract import Bound
from quantize.gate.intervals import Interval
from quantize.search import bounds
from quantize.search.find import Search
from quantize.search.groups import Group, Key, everywhere, rules
from quantize.search.ladder import Problem, climb, spread
from quantize.search.order import pick, rank_correlation, squared_error
from quantize.search.points import Measured, bisect
from quantize.search.sensitivity import Effect, State
from quantize.search.subject import choose_cost


def test_a_recipe_with_nothing_to_search_is_rejected() -> None:
    with pytest.raises(UsageError, match="recipe fp32 quantizes nothing, so there is nothing to search"):
        choose_cost(RECIPES["fp32"], KEEP, None)
    with pytest.raises(UsageError, match="--spare int8-weights is what recipe int8-weights does everywhere"):
        choose_cost(RECIPES["int8-weights"], "int8-weights", None)
    with pytest.raises(UsageError, match="has no low-precision computation; search it with --cost bytes"):
        choose_cost(RECIPES["int4-weights"], KEEP, "operations")
    assert choose_cost(RECIPES["int8"], KEEP, None) == "operations"
    assert choose_cost(RECIPES["int4-weights"], KEEP, None) == "bytes"


def test_rules_spare_exactly_the_layers_of_their_groups() -> None:
    groups = {("transformer", n): Group("transformer", n, (n, f"{n}b"), 1.0, 1) for n in ("x.1", "x.2")}
    made = rules(groups, frozenset({("transformer", "x.2")}), KEEP)  # type: ignore[arg-type]
    assert [(rule.layers, rule.scheme) for rule in made] == [("x.2", KEEP), ("x.2b", KEEP)]
    assert {rule.scheme for rule in everywhere(RECIPES["int8"], "int8-weights").rules} == {"int8-weights"}


def problem_of(effects: list[float], costs: list[float]) -> Problem:
    keys: list[Key] = [("transformer", str(index)) for index in range(len(effects))]
    groups = {key: Group("transformer", key[1], (key[1],), cost, 1) for key, cost in zip(keys, costs, strict=True)}
    return Problem(
        groups, {(key, "quantized"): effect for key, effect in zip(keys, effects, strict=True)}, "operations", True
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_rung_is_an_exact_optimum(seed: int) -> None:
    rng = random.Random(seed)
    problem = problem_of([rng.lognormvariate(0, 2) for _ in range(8)], [rng.uniform(1, 5) for _ in range(8)])
    rungs = climb(problem)
    assert [len(rung.spared) for rung in rungs] == list(range(9))
    for rung in rungs:
        better = [
            some
            for size in range(9)
            for some in combinations(problem.groups, size)
            if problem.spent(frozenset(some)) < rung.cost + 1e-12
            and problem.predict(frozenset(some)) < rung.predicted - 1e-12
        ]
        assert not better


def smoothing_problem(unsmoothed: float) -> Problem:
    maker, reader, other = (("transformer", name) for name in ("maker", "reader", "other"))
    groups: dict[Key, Group] = {
        maker: Group("transformer", "maker", ("maker",), 1.0, 1),  # type: ignore[dict-item]
        reader: Group("transformer", "reader", ("reader",), 1.0, 1, ("maker",), smoothed=True),  # type: ignore[dict-item]
        other: Group("transformer", "other", ("other",), 1.0, 1),  # type: ignore[dict-item]
    }
    effects = {(maker, "quantized"): 5.0, (reader, "quantized"): 1.0, (other, "quantized"): 2.0}
    return Problem(groups, effects | {(reader, "unsmoothed"): unsmoothed}, "operations", True)  # type: ignore[arg-type]


def test_a_group_that_smooths_another_is_spared_with_it() -> None:
    assert [key[1] for key in climb(smoothing_problem(50.0))[-1].spared][:2] in (
        ["maker", "reader"],
        ["other", "maker"],
    )
    costly = climb(smoothing_problem(50.0))
    assert all(rung.predicted <= costly[0].predicted for rung in costly)
    assert [key[1] for key in climb(smoothing_problem(1.0))[1].spared] == ["maker"]


def test_sparing_a_group_counts_the_smoothing_it_removes() -> None:
    problem = smoothing_problem(50.0)
    assert problem.predict(frozenset()) == 8.0
    assert problem.predict(frozenset({("transformer", "maker")})) == 52.0
    assert problem.predict(frozenset({("transformer", "maker"), ("transformer", "reader")})) == 2.0


def test_points_are_spread_over_the_cost_with_both_ends() -> None:
    rungs = climb(problem_of([float(9 - index) for index in range(9)], [1.0] * 9))
    assert spread(rungs, 4) == [0, 3, 6, 9]
    assert spread(rungs, 2) == [0, 9]
    assert spread(rungs, 50) == list(range(10))


def test_bisection_measures_few_rungs_and_finds_the_first_that_meets() -> None:
    asked: list[int] = []

    def meets(index: int) -> bool:
        asked.append(index)
        return index >= 23

    assert bisect(0, 64, meets) == 23
    assert len(asked) == 6


def search_of(
    psnr: Callable[[int], float], wanted: list[Bound], spare: str = KEEP, alone: int = 0
) -> tuple[Search, list[str]]:
    drawn: list[str] = []
    problem = problem_of([float(2**index) for index in range(10)], [1.0] * 10)

    def draw(name: str, made: tuple[Any, ...]) -> Measured:
        drawn.append(name)
        value = psnr(len(made))
        return Measured({"psnr": Interval(value, value, value, 4, 4)}, 10 ** (-value / 10), 1)

    effects: dict[tuple[Key, State], Effect] = {
        (key, "quantized"): Effect(problem.effects[key, "quantized"], 0.01) for key in problem.groups
    }
    return Search(problem, effects, "int8", spare, draw, 3, wanted, alone), drawn


def test_the_cheapest_rung_that_meets_the_bound_is_chosen_and_none_is_measured_twice() -> None:
    search, drawn = search_of(lambda spared: 30.0 + spared, [Bound("psnr", 37)])
    found = search.run()
    assert found.chosen is not None
    assert (found.chosen.name, len(found.chosen.rung.spared)) == ("int8-spare-7", 7)
    assert len(drawn) == len(set(drawn)) <= search.most_drawings()
    assert [point.name for point in found.points] == sorted(drawn, key=lambda name: int(name.split("-")[-1]))


def test_sparing_everything_is_not_a_result() -> None:
    search, _ = search_of(lambda spared: 100.0 if spared == 10 else 30.0, [Bound("psnr", 50)])
    assert search.run().chosen is None
    search, _ = search_of(lambda spared: 100.0 if spared == 10 else 30.0, [Bound("psnr", 50)], spare="int8-weights")
    chosen = search.run().chosen
    assert chosen is not None
    assert len(chosen.rung.spared) == 10


def test_groups_quantized_alone_check_the_predicted_order() -> None:
    search, drawn = search_of(lambda spared: 40.0, [], alone=4)
    assert search.run().correlations["predicted, latents"] is None  # all measured alike
    assert drawn.count("int8-alone") == 4
    assert [key[1] for key in pick(search.problem, 3)] == ["9", "5", "0"]
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert squared_error(20.0) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr", "--meet 'psnr': expected METRIC=VALUE, as in psnr=45"),
        ("sharpness=3", "unknown metric 'sharpness'; there are: psnr, ssim"),
        ("psnr=high", "--meet psnr=high: 'high' is not a number"),
        ("psnr=nan", "'nan' is not a number"),
    ],
)
def test_a_quality_that_cannot_be_read_is_rejected(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bounds.parse(text)


def test_a_quality_is_a_bound_of_the_gate() -> None:
    assert (bounds.parse("psnr=45").side, bounds.parse("flip=0.1").side) == ("at_least", "at_most")
