"""Plan capacity without a GPU or heavy imports: what fits on a GPU and how, how fast it is, what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

from kit.gpus import GPUS
from kit.recipes import recipe
from planner.costs import Costs, Workload, cost
from planner.feasible import SIDES
from planner.layout import Choice, Layout, Placement, lay_out
from planner.load import Load, Service, find_load
from planner.memory import HOST_RESERVE
from planner.prices import HostNeed, Prices
from planner.question import Question
from planner.speed import Calibration, calibration
from planner.timing import Range, Timing, outside, times


@dataclass(frozen=True)
class Tried:
    """One choice with its bytes, and its times if it works."""

    choice: Choice
    layout: Layout
    timing: Timing | None

    @property
    def works(self) -> bool:
        return self.timing is not None


@dataclass(frozen=True)
class Plan:
    """The answer."""

    question: Question
    tried: tuple[Tried, ...]
    chosen: Tried | None  # the first choice that works and that no other of its recipe beats in time and cost
    per_minute: Range | None  # of one replica
    load: Load | None
    costs: Costs | None
    elsewhere: tuple[str, ...] = ()  # GPUs on which the question has an answer if this one has none
    nearest: str | None = None  # the nearest setting that works if nothing does


def choices(question: Question) -> Iterator[Choice]:
    """Yield the choices in order of preference: fast recipes first, weights on the GPU before streaming or the CPU.

    A placement that is not built yet is left out unless the question names it.
    """
    if question.built is not None:
        yield Choice(recipe(question.built.recipe), question.text_encoder or "resident")
        return
    names: tuple[str, ...] = (question.gpu.default_recipe, "int4-weights")
    for name in names if question.recipe is None else (question.recipe,):
        placements: tuple[Placement, ...] = ("resident", "evicted")
        if question.gpus > 1:
            placements = ("resident", "own-gpu", "evicted")
        if question.text_encoder is not None:
            placements = (question.text_encoder,)
        for placement in placements:
            yield Choice(recipe(name), placement)
        yield Choice(recipe(name), placements[-1], streamed=True)
        if question.text_encoder is None:
            yield Choice(recipe(name), "cpu")


def plan(question: Question, prices: Prices, price: float | None = None, model: Calibration | None = None) -> Plan:
    """Try all choices and select one; `price` overrides the table's dollars per GPU hour.

    The order of preference is that of `choices`. A choice is passed over if another of the same recipe is both faster
    and cheaper, or if it misses the goal for the 95th percentile and a later choice meets it.
    """
    model = model or calibration()
    tried = _try_all(question, model)
    working = [t for t in tried if t.works]
    if not working:
        return Plan(question, tried, None, None, None, None, _elsewhere(question, model), _nearest(question, model))
    answers = [_answer(question, tried, one, prices, price, model) for one in working]
    recipes = [one.choice.recipe for one in working]
    same = [answer for answer, recipe in zip(answers, recipes, strict=True) if recipe == recipes[0]]
    best = next(answer for answer in same if not any(_beats(other, answer) for other in same))
    if question.rate is None:
        return best
    loaded = _loaded(best, prices, price, model)
    if question.p95 is not None and question.replicas is None:
        fast = [t.timing is not None and t.timing.image.high <= question.p95 for t in working]
        others = (
            _loaded(other, prices, price, model)
            for other, quick in zip(answers, fast, strict=True)
            if quick and other is not best
        )
        return next((answer for answer in chain([loaded], others) if answer.load and answer.load.meets), loaded)
    return loaded


def host_need(question: Question, tried: Tried) -> HostNeed:
    """Return what a choice needs of the host, per GPU."""
    cores = question.cores if tried.choice.text_encoder == "cpu" else 1
    return HostNeed(tried.layout.host + HOST_RESERVE, tried.layout.host, cores)


def _answer(
    question: Question,
    tried: tuple[Tried, ...],
    chosen: Tried,
    prices: Prices,
    price: float | None,
    model: Calibration,
) -> Plan:
    """Complete the plan of one choice that works: throughput, and costs at full load."""
    timing = chosen.timing
    assert timing is not None
    limit = timing.busy
    if chosen.choice.text_encoder in ("cpu", "own-gpu"):  # prompts queue there, beside the GPU
        limit = Range(*(max(a, b) for a, b in zip(_ends(limit), _ends(timing.text), strict=True)))
    per_minute = limit.per(60.0 * question.batch)
    costs = cost(_workload(question, chosen, per_minute), question.gpu, prices, price, None, question.replicas or 1)
    return Plan(question, tried, chosen, per_minute, None, costs)


def _loaded(answer: Plan, prices: Prices, price: float | None, model: Calibration) -> Plan:
    """Add the load at the requested rate, and the costs of the replicas that it needs."""
    question, chosen, per_minute = answer.question, answer.chosen, answer.per_minute
    assert question.rate is not None
    assert chosen is not None
    assert per_minute is not None
    load = find_load(service(answer, model), question.rate / 60, question.replicas, question.p95)
    served = question.rate if load.waiting is not None else None
    job = _workload(question, chosen, per_minute)
    return replace(answer, load=load, costs=cost(job, question.gpu, prices, price, served, load.replicas))


def _workload(question: Question, chosen: Tried, per_minute: Range) -> Workload:
    return Workload(
        variant=question.variant,
        pixels=question.width * question.height,
        reference_pixels=question.references * question.shape.encoded.pixels,
        steps=question.step_count,
        per_minute=per_minute,
        cards=2 if chosen.choice.text_encoder == "own-gpu" else 1,
        need=host_need(question, chosen),
    )


def _beats(one: Plan, other: Plan) -> bool:
    """Return whether a plan is faster and cheaper than another, or equal in one of the two and better in the other."""
    first, second = _merits(one), _merits(other)
    return first != second and all(a <= b for a, b in zip(first, second, strict=True))


def _merits(answer: Plan) -> tuple[float, float]:
    """Return the seconds of an image, and its cost in dollars, or in seconds of all GPUs where no price is known."""
    assert answer.chosen is not None
    assert answer.chosen.timing is not None
    assert answer.per_minute is not None
    cards = 2 if answer.chosen.choice.text_encoder == "own-gpu" else 1
    cost = answer.costs.per_thousand.mid if answer.costs else cards / answer.per_minute.mid
    return answer.chosen.timing.image.mid, cost


def _try_all(question: Question, model: Calibration) -> tuple[Tried, ...]:
    """Try all choices; weights are streamed only if the same choice does not fit otherwise."""
    found: list[Tried] = []
    for choice in choices(question):
        unstreamed = next((t for t in found if t.choice == replace(choice, streamed=False)), None)
        if not (choice.streamed and unstreamed and unstreamed.works):
            found.append(_try(question, choice, model))
    return tuple(found)


def _try(question: Question, choice: Choice, model: Calibration) -> Tried:
    layout = lay_out(question.variant, question.gpu, choice, question.shape, question.gpus, question.built)
    if layout.reason:
        return Tried(choice, layout, None)
    timing = times(
        question.variant,
        question.gpu,
        choice,
        layout,
        question.shape,
        question.step_count,
        question.cores,
        model,
        question.step_seconds,
        question.roofline,
    )
    return Tried(choice, layout, timing)


def _works(question: Question, model: Calibration) -> bool:
    return any(tried.works for tried in _try_all(question, model))


def _elsewhere(question: Question, model: Calibration) -> tuple[str, ...]:
    """List the GPUs on which the question has an answer, by increasing memory."""
    others = sorted((g for g in GPUS.values() if g is not question.gpu), key=lambda g: g.memory_bytes)
    return tuple(other.name for other in others if _works(replace(question, gpu=other), model))


def _nearest(question: Question, model: Calibration) -> str | None:
    """Return the change of one option, the mildest first, that makes a plan work on the GPU."""
    changes = [(f"--batch {batch}", replace(question, batch=batch)) for batch in range(question.batch - 1, 0, -1)]
    changes += [
        (f"--references {count}", replace(question, references=count))
        for count in range(question.references - 1, -1, -1)
    ]
    changes += [("another --text-encoder", replace(question, text_encoder=None))]
    changes += [("another --recipe", replace(question, recipe=None))]
    changes += [
        (f"--width {side} --height {side}", replace(question, width=side, height=side))
        for side in SIDES
        if side * side < question.width * question.height
    ]
    return next((words for words, changed in changes if _works(changed, model)), None)


def _ends(value: Range) -> tuple[float, float, float]:
    return value.low, value.mid, value.high


def service(answer: Plan, model: Calibration) -> Service:
    """Describe a replica of a plan, which batches its live requests up to the question's batch size."""
    question, chosen, per_minute = answer.question, answer.chosen, answer.per_minute
    assert chosen is not None
    assert chosen.timing is not None
    assert per_minute is not None
    busy, steps = per_minute.per(60.0 * question.batch), []  # back to the seconds of a batch
    for count in range(1, question.batch + 1):
        tried = _try(replace(question, batch=count, step_seconds=None), chosen.choice, model)
        assert tried.timing is not None  # a smaller batch needs less
        steps.append(tried.timing.step.mid)
    gains = [count * steps[0] / step for count, step in enumerate(steps, start=1)]
    return Service(busy.times(gains[-1] / question.batch), gains, outside(model), chosen.timing.step_share)
