"""Render plans as plain-text tables, with colour on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from kit.ports import PartName
from planner.facts import basis
from planner.memory import gigabytes
from planner.plan import Load, Plan, Question, Tried
from planner.timing import Range

NAMES: Mapping[PartName, str] = {
    "text_encoder": "text encoder",
    "transformer": "transformer",
    "vae_encoder": "VAE encoder",
    "vae_decoder": "VAE decoder",
}
GREEN, RED, BOLD, DIM = "32", "31", "1", "2"


def coloured() -> bool:
    """Return whether to colour stdout: it is a terminal and NO_COLOR is not set."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


NO_BF16 = "no bf16: graphs run in fp32 only, and TensorRT for RTX starts at compute capability 8.0"


def render(answer: Plan, colour: bool = False) -> str:
    """Render one plan."""
    question = answer.question
    preview = " (preview: specifications only, not tuned)" if question.gpu.preview else ""
    narrow = "" if question.gpu.has("bf16") else f" ({NO_BF16})"
    title = f"{question.variant.name} on {question.gpu.title}{preview}{narrow}"
    lines = [
        colorize(title, BOLD, colour),
        f"{_setting(question)}; licence {question.variant.licence}",
        *_note(question),
        "",
        *_all_tried(answer, colour),
    ]
    if answer.chosen is not None:
        lines += ["", *_memory(answer.chosen), "", *_times(answer, answer.chosen)]
        if answer.load is not None:
            lines += ["", *_load(answer.load, question.rate or 0.0, colour)]
        lines += ["", *_costs(answer), "", colorize(_basis(answer), DIM, colour)]
    return "\n".join(lines)


def _setting(question: Question) -> str:
    return f"{question.width}x{question.height}, {question.step_count} steps, batch {question.batch}"


def compare(answers: Sequence[Plan], colour: bool = False) -> str:
    """Render one row per GPU."""
    question = answers[0].question
    title = f"{question.variant.name}, {_setting(question)}"
    head = (
        f"{'gpu':<12}{'recipe':<14}{'memory':>17}  {'s per batch':<22}{'images per minute':<22}{'$ per 1,000':<22}how"
    )
    lines = [colorize(title, BOLD, colour), colorize(head, DIM, colour)]
    for answer in answers:
        gpu, chosen = answer.question.gpu, answer.chosen
        name = f"{gpu.name}{'*' if gpu.preview else ''}"
        if chosen is None or chosen.timing is None or answer.per_minute is None:
            reason = answer.tried[0].layout.reason or ""
            lines.append(colorize(f"{name:<12}does not fit: {reason}", RED, colour))
            continue
        cost = _span(answer.costs.per_thousand, 2) if answer.costs else "-"
        memory = f"{chosen.layout.needed / 1e9:.1f} of {gigabytes(chosen.layout.usable)}"
        how = chosen.choice.describe().split(", ", 1)[1]
        lines.append(
            f"{name:<12}{chosen.choice.recipe.name:<14}{memory:>17}  {_span(chosen.timing.image):<22}"
            f"{_span(answer.per_minute):<22}{cost:<22}{how}"
        )
    if any(answer.question.gpu.preview for answer in answers):
        lines.append("* preview: specifications only, not tuned")
    return "\n".join([*lines, *_note(question)])


def _note(question: Question) -> list[str]:
    return [f"note: {question.note}"] if question.note else []


def _all_tried(answer: Plan, colour: bool) -> list[str]:
    """List the choices tried up to the first that works, then the others that would work."""
    if answer.chosen is None:
        return [_tried(t, None, colour) for t in answer.tried]
    end = answer.tried.index(answer.chosen) + 1
    lines = [_tried(t, answer.chosen, colour) for t in answer.tried[:end]]
    return lines + [_tried(t, answer.chosen, colour) for t in answer.tried[end:] if t.works]


def _tried(tried: Tried, chosen: Tried | None, colour: bool) -> str:
    if tried.timing is None:
        return f"  {colorize('no ', RED, colour)}  {tried.choice.describe()}: {tried.layout.reason}"
    mark = colorize("YES" if tried is chosen else "yes", GREEN, colour)
    used = f"{tried.layout.needed / 1e9:.1f} of {gigabytes(tried.layout.usable)}"
    return f"  {mark}  {tried.choice.describe()}: {used}, {tried.timing.image.mid:.3g} s"


def _memory(chosen: Tried) -> list[str]:
    layout = chosen.layout
    rows = [(f"{NAMES[part]}, weights", count) for part, count in layout.weights.items()]
    rows += [
        (f"activations, at most ({NAMES[layout.arena_part]})", layout.arena),
        ("requests in flight", layout.requests),
        (f"total, of {gigabytes(layout.usable)} usable", layout.needed),
    ]
    lines = ["memory"] + [f"  {words:<46}{gigabytes(count):>9}" for words, count in rows]
    if layout.host:
        lines.append(f"  {'in host memory':<46}{gigabytes(layout.host):>9}")
    if layout.streamed:
        lines.append(f"  {'streamed to the GPU in every step':<46}{gigabytes(layout.streamed):>9}")
    return lines


def _times(answer: Plan, chosen: Tried) -> list[str]:
    timing = chosen.timing
    assert timing is not None
    assert answer.per_minute is not None
    rows = [
        ("text encoder, s", timing.text),
        (f"one step, s ({timing.ceiling:.3g} at the dense rate)", timing.step),
        ("VAE decoder, s", timing.decode),
        (f"{_images(answer.question.batch)}, from prompt to file, s", timing.image),
        ("images per minute", answer.per_minute),
    ]
    return ["time, with range"] + [f"  {words:<46}{_span(value)}" for words, value in rows]


def _images(batch: int) -> str:
    return "image" if batch == 1 else f"batch of {batch} images"


def _load(load: Load, rate: float, colour: bool) -> list[str]:
    some = "replica" if load.replicas == 1 else "replicas"
    lines = [f"at {rate:g} images per minute, Poisson arrivals, {load.replicas} {some}"]
    for words, waiting in (("best estimate", load.waiting), ("slow end of the range", load.slow)):
        if waiting is None:
            lines.append(f"  {words:<24}{colorize('overloaded: the queue grows without bound', RED, colour)}")
        else:
            lines.append(
                f"  {words:<24}busy {waiting.load:>4.0%}  p50 {waiting.p50:.2f} s  p95 {waiting.p95:.2f} s  "
                f"p99 {waiting.p99:.2f} s"
            )
    return lines


def _costs(answer: Plan) -> list[str]:
    costs = answer.costs
    if costs is None:
        return ["cost: no price known for this GPU; set one with --price"]
    lines = [
        f"cost: ${_span(costs.per_hour, 2)} per hour, ${_span(costs.per_thousand, 2)} per 1,000 images at full load"
    ]
    if costs.at_rate is not None:
        lines.append(f"  at the requested rate: ${costs.at_rate:.2f} per 1,000")
    for even in costs.break_even:
        hosted = even.hosted
        what = f"  against {hosted.offer} (${even.usd_per_image:g} per image, {hosted.date}): "
        if even.possible:
            lines.append(f"{what}cheaper from {even.images:,.0f} images per month")
        else:
            lines.append(f"{what}never cheaper: one GPU would have to generate {even.images:,.0f} images per month")
    return lines


def _basis(answer: Plan) -> str:
    found = basis(answer)
    here, near = found["points_on_this_gpu"], found["points_on_its_generation"]
    return (
        f"basis: fitted {found['calibrated']} to {found['points']} public measurements, median error "
        f"{found['held_out_median_error']:.0%} on {found['held_out_points']} held out; "
        f"{here or 'none'} of them on this GPU, {near} on its generation"
    )


def _span(value: Range, digits: int | None = None) -> str:
    """Format a range as `1.74 (1.22-2.07)`."""
    low, mid, high = (
        f"{v:.{digits}f}" if digits is not None else _short(v) for v in (value.low, value.mid, value.high)
    )
    return mid if low == mid == high else f"{mid} ({low}-{high})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def colorize(words: str, code: str, colour: bool) -> str:
    return f"\033[{code}m{words}\033[0m" if colour else words
