"""2,000 random questions to the planner, each answered in a way that its own figures bear out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from kit.__main__ import main as kit
from kit.gpus import GPUS
from kit.recipes import RECIPES
from kit.variants import VARIANTS
from planner.compare import ranked
from planner.costs import MINUTES_PER_MONTH
from planner.load import BUSY_AT_MOST
from planner.memory import HOST_RESERVE, usable_bytes
from planner.plan import Plan, Tried, plan
from planner.prices import GIB, read_prices
from planner.question import Question
from planner.timing import Range

COUNT = 2_000
PRICES = read_prices()
SIDES = (256, 512, 768, 1024, 1360, 1536, 2048)


def questions(seed: int, count: int) -> Iterator[Question]:
    """Draw questions of every kind; one in ten has a rate, because a load is simulated for it."""
    draw = random.Random(seed)
    while count:
        question = Question(
            variant=draw.choice(list(VARIANTS.values())),
            gpu=draw.choice(list(GPUS.values())),
            recipe=draw.choice([None, None, *RECIPES]),
            text_encoder=draw.choice([None, None, None, "resident", "evicted", "own-gpu", "cpu", "cache"]),
            width=draw.choice(SIDES),
            height=draw.choice(SIDES),
            steps=draw.choice([None, None, 1, 4, 8, 28, 50, 100]),
            batch=draw.choice([1, 1, 1, 2, 4, 16, 64]),
            references=draw.choice([0, 0, 0, 1, 2, 4, 10]),
            gpus=draw.choice([1, 1, 1, 2, 8]),
            cores=draw.choice([1, 4, 16, 64, 192]),
            rate=draw.choice([0.1, 5.0, 60.0, 3000.0]) if draw.random() < 0.1 else None,
            p95=draw.choice([None, 0.5, 5.0, 60.0, 600.0]),
            replicas=draw.choice([None, None, 1, 3]),
            step_seconds=draw.choice([None, None, None, 0.001, 0.2, 30.0]),
        )
        question = question if question.rate else replace(question, p95=None)
        if question.refusal() is None:
            count -= 1
            yield question


def ordered(value: Range) -> bool:
    return 0 <= value.low <= value.mid <= value.high


def check(answer: Plan) -> None:
    question, chosen, costs, load = answer.question, answer.chosen, answer.costs, answer.load
    for tried in answer.tried:
        assert tried.works == (tried.layout.reason is None)
        if tried.timing is not None:
            timing = tried.timing
            spans = (timing.text, timing.references, timing.step, timing.decode, timing.image, timing.busy)
            assert all(map(ordered, spans))
            assert (timing.references.mid > 0) == (question.references > 0)
            assert timing.busy.mid <= timing.image.mid
            assert tried.layout.needed <= tried.layout.usable == usable_bytes(question.gpu) < question.gpu.memory_bytes
    if chosen is None:
        assert not any(tried.works for tried in answer.tried)
        return
    assert chosen.works
    assert answer.per_minute is not None
    assert ordered(answer.per_minute)
    assert (load is None) == (question.rate is None)
    if load is not None and load.slow is not None:
        assert load.waiting is not None
        assert load.waiting.p50 <= load.waiting.p95 <= load.slow.p95
        if question.replicas is None:
            assert load.slow.load <= BUSY_AT_MOST + 1e-9
    if costs is not None:
        check_costs(answer)


def ends(tried: Tried, name: str) -> tuple[float, float, float]:
    found = getattr(tried.timing, name)
    return found.low, found.mid, found.high


def check_more_references(question: Question) -> None:
    """One reference more makes no choice smaller, faster or cheaper, and lets none fit that did not."""
    fewer = plan(replace(question, rate=None, p95=None), PRICES, price=1.0)
    more = plan(replace(fewer.question, references=question.references + 1), PRICES, price=1.0)
    before = {tried.choice: tried for tried in fewer.tried}
    for tried in more.tried:
        if (known := before.get(tried.choice)) is None:
            assert tried.choice.streamed  # which is tried only if the same choice does not fit otherwise
            continue
        assert tried.layout.needed >= known.layout.needed
        assert tried.layout.host >= known.layout.host
        if tried.timing is None:
            continue
        assert known.timing is not None
        for name in ("text", "references", "step", "decode", "image", "busy"):
            assert all(ours >= theirs for ours, theirs in zip(ends(tried, name), ends(known, name), strict=True)), name
    if more.chosen is not None and fewer.chosen is not None and more.chosen.choice == fewer.chosen.choice:
        assert more.costs is not None
        assert fewer.costs is not None
        assert more.costs.per_thousand.mid >= fewer.costs.per_thousand.mid  # equal where prompts queue at the CPU
    assert fewer.chosen is not None or more.chosen is None


def check_costs(answer: Plan) -> None:
    question, chosen, costs, load = answer.question, answer.chosen, answer.costs, answer.load
    assert chosen is not None
    assert costs is not None
    assert answer.per_minute is not None
    offer, layout = costs.offer, chosen.layout
    if offer.memory_gib is None:
        assert layout.host == 0
    else:
        assert offer.memory_gib * GIB >= layout.host + HOST_RESERVE
    if chosen.choice.text_encoder == "cpu" and offer.cores is not None:
        assert offer.cores >= question.cores
    cards = 2 if chosen.choice.text_encoder == "own-gpu" else 1
    assert costs.per_hour.mid == pytest.approx(cards * offer.usd_per_hour)
    assert ordered(costs.per_hour)
    assert ordered(costs.per_thousand)
    hours = 1000 / answer.per_minute.mid / 60
    assert costs.per_thousand.mid == pytest.approx(costs.per_hour.mid * hours)
    if question.rate is None or load is None or load.waiting is None:
        assert costs.at_rate is None
    else:
        assert costs.at_rate is not None
        assert costs.at_rate == pytest.approx(load.replicas * costs.per_hour.mid / question.rate / 60 * 1000)
        assert costs.at_rate > costs.per_thousand.mid  # replicas are never busy all the time
    for even in costs.break_even:
        own = costs.per_month / even.images
        assert own == pytest.approx(even.usd_per_image)
        assert even.possible == (even.images <= costs.capacity)
        if costs.at_rate is not None:
            assert even.cheaper == (costs.at_rate / 1000 < even.usd_per_image)


@pytest.mark.parametrize("part", range(4))
def test_every_answer_agrees_with_itself(part: int) -> None:
    for question in questions(part, COUNT // 4):
        try:
            check(plan(question, PRICES))
        except AssertionError as error:
            raise AssertionError(f"{question}") from error


def test_more_references_are_never_smaller_faster_or_cheaper() -> None:
    seen = {0: 0, 1: 0}
    for question in questions(30, 240):
        if question.references < question.variant.max_references:
            try:
                check_more_references(question)
            except AssertionError as error:
                raise AssertionError(f"{question}") from error
            seen[min(question.references, 1)] += 1
    assert min(seen.values()) > 60


def test_no_choice_is_slower_and_dearer_than_another_of_its_recipe() -> None:
    for question in questions(10, 150):
        answer = plan(replace(question, rate=None, p95=None), PRICES)
        if answer.chosen is None or answer.costs is None:
            continue
        for tried in answer.tried:
            if tried.timing is None or tried.choice.recipe != answer.chosen.choice.recipe or tried.choice.streamed:
                continue
            other = plan(replace(answer.question, text_encoder=tried.choice.text_encoder), PRICES)
            if other.chosen is None or other.costs is None or other.chosen.choice != tried.choice:
                continue
            assert answer.chosen.timing is not None
            assert other.costs is not None
            faster = tried.timing.image.mid < answer.chosen.timing.image.mid
            assert not (faster and other.costs.per_thousand.mid < answer.costs.per_thousand.mid), question


def test_the_volume_of_the_break_even_costs_what_the_service_costs() -> None:
    seen = 0
    for question in questions(20, 200):
        answer = plan(replace(question, rate=None, p95=None, replicas=None, batch=1), PRICES)
        if answer.costs is None:
            continue
        for even in answer.costs.break_even:
            if even.possible:
                rate = even.images / MINUTES_PER_MONTH
                at = plan(replace(answer.question, rate=rate), PRICES)
                assert at.load is not None
                assert at.costs is not None
                assert at.costs.at_rate is not None
                assert at.load.replicas == 1, question
                assert at.costs.at_rate / 1000 == pytest.approx(even.usd_per_image), question
                seen += 1
                break
    assert seen > 10


@pytest.mark.parametrize("goal", [None, 3.0])
def test_gpus_are_ranked_by_cost_and_those_that_miss_the_goal_come_last(goal: float | None) -> None:
    klein = VARIANTS["klein-4b"]
    answers = ranked([plan(Question(klein, card, rate=60.0, p95=goal), PRICES) for card in GPUS.values()])
    met = [answer for answer in answers if answer.load and answer.load.meets]
    assert answers[: len(met)] == met
    listed = [answer.costs.at_rate for answer in met if answer.costs and answer.costs.listed]
    assert listed == sorted(listed, key=lambda cost: cost or 0.0)
    assert [bool(answer.costs and answer.costs.listed) for answer in met] == sorted(
        (bool(answer.costs and answer.costs.listed) for answer in met), reverse=True
    )


def test_with_a_rate_the_cheapest_gpu_that_meets_the_goal_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert kit(["plan", "--variant", "klein-4b", "--gpu", "all", "--rate", "60", "--p95", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "60 images per minute, p95 of at most 3 s, cheapest first" in lines[0]
    rows = [line for line in lines[2:] if line.split()[0].strip("*") in GPUS]
    assert len(rows) == len(GPUS)
    missed = ["missed" in row for row in rows]
    assert missed == sorted(missed)
    assert {"l4", "a10g"} <= {row.split()[0] for row in rows if "missed" in row}
    market = ["~" in row for row in rows if "missed" not in row and "  -  " not in row]
    assert market == sorted(market)
