"""Plan capacity without a GPU or heavy imports: what fits on a GPU and how, how fast it is, what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kit.gpus import GPUS, Gpu
from kit.image_size import size_problem
from kit.recipes import recipe
from kit.variants import Variant
from planner.costs import Costs, Workload, cost
from planner.feasible import SIDES
from planner.layout import NOT_BUILT, Choice, Layout, Placement, lay_out
from planner.memory import Shape
from planner.prices import Prices
from planner.queueing import Waiting, simulate
from planner.speed import Calibration, calibration
from planner.timing import Range, Timing, times

BUSY_AT_MOST = 0.85  # of a replica at the slow end of the range, when the planner chooses the number of replicas
MAX_STEPS, MAX_BATCH, MAX_REPLICAS = 100, 64, 10_000


@dataclass(frozen=True)
class Question:
    """The question to plan for; the command line reads its defaults from here."""

    variant: Variant
    gpu: Gpu
    recipe: str | None = None  # None: the GPU's recipe, then smaller ones
    text_encoder: Placement | None = None  # None: the planner chooses
    width: int = 1024
    height: int = 1024
    steps: int | None = None  # None: the variant's default
    batch: int = 1
    gpus: int = 1  # per replica: with two, the text encoder may have its own
    cores: int = 16  # of the host, for a text encoder on the CPU
    rate: float | None = None  # requested images per minute
    replicas: int | None = None  # None: as many as the rate needs
    step_seconds: float | None = None  # measured duration of one step of the batch; None: estimated

    @property
    def shape(self) -> Shape:
        return Shape(self.width, self.height, self.batch)

    @property
    def step_count(self) -> int:
        return self.variant.steps if self.steps is None else self.steps

    @property
    def note(self) -> str | None:
        """Say what is missing for a placement that was asked for; None when the kit can serve it."""
        return NOT_BUILT.get(self.text_encoder) if self.text_encoder else None

    def refusal(self) -> str | None:
        """Return a message for the first value that cannot be planned for, None if all are valid."""
        bounds = (("--steps", self.step_count, MAX_STEPS), ("--batch", self.batch, MAX_BATCH))
        for name, value, most in bounds:
            if not 1 <= value <= most:
                return f"{name} {value}: must be 1 to {most}"
        for name, count in (("--gpus", self.gpus), ("--cores", self.cores), ("--replicas", self.replicas)):
            if count is not None and not 1 <= count <= MAX_REPLICAS:
                return f"{name} {count}: must be 1 to {MAX_REPLICAS}"
        if self.rate is not None and not 0 < self.rate <= 1e6:
            return f"--rate {self.rate:g}: must be more than 0 images per minute, and at most 1e6"
        if self.step_seconds is not None and not 0 < self.step_seconds <= 1e4:
            return f"--step-seconds {self.step_seconds:g}: must be more than 0 seconds, and at most 1e4"
        if self.recipe is not None and (refused := self.gpu.refusal(self.recipe)):
            return refused
        return size_problem(self.width, self.height)


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
class Load:
    """The load on the replicas at the requested rate."""

    replicas: int
    waiting: Waiting | None  # at the best estimate; None: overloaded
    slow: Waiting | None  # at the slow end of the range


@dataclass(frozen=True)
class Plan:
    """The answer."""

    question: Question
    tried: tuple[Tried, ...]
    chosen: Tried | None  # the first choice that works
    per_minute: Range | None
    load: Load | None
    costs: Costs | None
    elsewhere: tuple[str, ...] = ()  # GPUs on which the question has an answer if this one has none
    nearest: str | None = None  # the nearest setting that works if nothing does


def choices(question: Question) -> Iterator[Choice]:
    """Yield the choices in order of preference: fast recipes first, weights on the GPU before streaming or the CPU.

    A placement that is not built yet is left out unless the question names it.
    """
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
    """Try all choices and select the first that works; `price` overrides the table's dollars per GPU hour."""
    model = model or calibration()
    tried = _try_all(question, model)
    chosen = next((t for t in tried if t.timing), None)
    if chosen is None or chosen.timing is None:
        return Plan(question, tried, None, None, None, None, _elsewhere(question, model), _nearest(question, model))
    limit = chosen.timing.busy
    if chosen.choice.text_encoder == "cpu":  # prompts queue for the CPU, not for the GPU
        limit = Range(*(max(a, b) for a, b in zip(_ends(limit), _ends(chosen.timing.text), strict=True)))
    per_minute = limit.per(60.0 * question.batch)
    load = _load(question, chosen, limit, model) if question.rate else None
    cards = 2 if chosen.choice.text_encoder == "own-gpu" else 1
    served = question.rate if load is not None and load.waiting is not None else None
    work = Workload(question.variant, question.width * question.height, question.step_count, per_minute)
    costs = cost(work, question.gpu, prices, price, cards, served, load.replicas if load else 1)
    return Plan(question, tried, chosen, per_minute, load, costs)


def _try_all(question: Question, model: Calibration) -> tuple[Tried, ...]:
    """Try all choices; weights are streamed only if the same choice does not fit otherwise."""
    found: list[Tried] = []
    for choice in choices(question):
        unstreamed = next((t for t in found if t.choice == replace(choice, streamed=False)), None)
        if not (choice.streamed and unstreamed and unstreamed.works):
            found.append(_try(question, choice, model))
    return tuple(found)


def _try(question: Question, choice: Choice, model: Calibration) -> Tried:
    layout = lay_out(question.variant, question.gpu, choice, question.shape, question.gpus)
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


def _load(question: Question, chosen: Tried, busy: Range, model: Calibration) -> Load:
    """Split the rate among replicas, each of which batches its live requests up to the question's batch size."""
    assert question.rate is not None
    per_second, steps = question.rate / 60, []
    for count in range(1, question.batch + 1):
        tried = _try(replace(question, batch=count, step_seconds=None), chosen.choice, model)
        assert tried.timing is not None  # a smaller batch needs less
        steps.append(tried.timing.step.mid)
    gains = [count * steps[0] / step for count, step in enumerate(steps, start=1)]
    alone = busy.times(gains[-1] / question.batch)  # seconds of one image alone on the GPU
    slowest = alone.high / max(gains)
    replicas = question.replicas or max(1, math.ceil(per_second * slowest / BUSY_AT_MOST))
    mid, slow = (simulate(per_second, gains, seconds, replicas) for seconds in (alone.mid, alone.high))
    return Load(replicas, _later(mid, model.outside), _later(slow, model.outside))


def _later(waiting: Waiting | None, seconds: float) -> Waiting | None:
    """Add the time that an image takes outside the GPU."""
    if waiting is None:
        return None
    moved = {name: getattr(waiting, name) + seconds for name in ("mean", "p50", "p95", "p99")}
    return replace(waiting, **moved)
