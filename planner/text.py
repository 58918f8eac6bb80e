"""Render one plan as plain text, with colour on a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

from kit.ports import PartName
from planner.costs import MINUTES_PER_MONTH, BreakEven, Costs
from planner.facts import basis
from planner.load import Load
from planner.memory import gigabytes
from planner.parts import reads_once
from planner.plan import Plan, Tried, host_need
from planner.question import Question
from planner.timing import Range

NAMES: Mapping[PartName, str] = {
    "text_encoder": "text encoder",
    "transformer": "transformer",
    "transformer_extract": "transformer, once for references",
    "transformer_cached": "transformer, steps",
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
        f"{setting(question)}; licence {question.variant.licence}",
        *note(question),
        "",
        *_all_tried(answer, colour),
    ]
    if answer.chosen is not None:
        lines += ["", *_memory(answer.chosen), "", *_times(answer, answer.chosen)]
        if answer.load is not None:
            lines += ["", *_load(answer.load, question.rate or 0.0, colour)]
        lines += ["", *_costs(answer), "", colorize(_basis(answer), DIM, colour)]
    return "\n".join(lines)


def setting(question: Question) -> str:
    words = f"{question.width}x{question.height}, {question.step_count} steps, batch {question.batch}"
    if not question.references:
        return words
    side, some = question.shape.reference_side, "reference" if question.references == 1 else "references"
    return f"{words}, {question.references} {some} of {side}x{side}"


def note(question: Question) -> list[str]:
    lines = [f"note: {question.note}"] if question.note else []
    if question.built is not None:
        name = question.built.folder
        lines.append(f"engine {name}: sizes of its plans, and activation memory at the largest of their profiles")
    return lines


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
    return f"  {mark}  {tried.choice.describe()}: {used}, {number(tried.timing.image.mid)} s"


def _memory(chosen: Tried) -> list[str]:
    layout = chosen.layout
    rows = [(f"{NAMES[part]}, weights", count) for part, count in layout.weights.items()]
    rows += [
        (f"activations, at most ({NAMES[layout.arena_part]})", layout.arena),
        ("requests in flight", layout.requests),
        *([("keys and values of references", layout.cache)] if layout.cache else []),
        (f"total, of {gigabytes(layout.usable)} usable", layout.needed),
    ]
    lines = ["memory, in GB of 10^9 bytes"] + [f"  {words:<46}{gigabytes(count):>9}" for words, count in rows]
    if layout.host:
        lines.append(f"  {'weights in host memory':<46}{gigabytes(layout.host):>9}")
    if layout.streamed:
        lines.append(f"  {'streamed to the GPU in every step':<46}{gigabytes(layout.streamed):>9}")
    if layout.streamed_once:
        lines.append(f"  {'streamed to the GPU for the references':<46}{gigabytes(layout.streamed_once):>9}")
    return lines


def _times(answer: Plan, chosen: Tried) -> list[str]:
    timing = chosen.timing
    assert timing is not None
    assert answer.per_minute is not None
    rows = [
        ("text encoder, s", timing.text),
        *([(_references(answer.question), timing.references)] if answer.question.references else []),
        (f"one step, s ({number(timing.ceiling)} {_ceiling(answer.question)})", timing.step),
        ("VAE decoder, s", timing.decode),
        (f"{_images(answer.question.batch)}, from prompt to file, s", timing.image),
        ("images per minute", answer.per_minute),
    ]
    return ["time, with range"] + [f"  {words:<46}{span(value)}" for words, value in rows]


def _ceiling(question: Question) -> str:
    return "at the dense rate" if question.roofline is None else "by the engine's layers"


def _references(question: Question) -> str:
    both = "VAE encoder, keys and values" if reads_once(question.variant, question.references) else "VAE encoder"
    return f"references: {both}, s"


def _images(batch: int) -> str:
    return "image" if batch == 1 else f"batch of {batch} images"


def _load(load: Load, rate: float, colour: bool) -> list[str]:
    some = "replica" if load.replicas == 1 else "replicas"
    lines = [f"at {rate:g} images per minute, Poisson arrivals, {load.replicas:,} {some}"]
    for words, waiting in (("best estimate", load.waiting), ("slow end of the range", load.slow)):
        if waiting is None:
            lines.append(f"  {words:<24}{colorize('overloaded: the queue grows without bound', RED, colour)}")
        else:
            lines.append(
                f"  {words:<24}busy {waiting.load:>4.0%}  p50 {number(waiting.p50)} s  p95 {number(waiting.p95)} s  "
                f"p99 {number(waiting.p99)} s"
            )
    if load.goal is not None:
        words = f"p95 of at most {load.goal:g} s at the slow end: "
        lines.append("  " + words + (colorize("met", GREEN, colour) if load.meets else colorize("missed", RED, colour)))
    return lines


def _costs(answer: Plan) -> list[str]:
    costs = answer.costs
    if costs is None:
        return [f"cost: {no_price(answer)}"]
    hour, used = costs.per_hour, costs.per_hour.mid
    lines = [
        f"cost: ${used:.2f} per hour ({costs.offer.describe()}), "
        f"${span(costs.per_thousand, 2)} per 1,000 images at full load"
    ]
    if not costs.listed:
        lines.append("  this price was seen on a market; it is no offer that can be booked at any time")
    if hour.low < hour.high:
        lines.append(f"  elsewhere, on hosts large enough or not stated: ${hour.low:.2f} to ${hour.high:.2f}")
    if costs.at_rate is not None:
        lines.append(f"  at the requested rate: ${costs.at_rate:.2f} per 1,000, ${costs.per_month:,.0f} per month")
    if answer.question.references and not costs.break_even:
        lines.append("  no hosted service is known that states a price for reference images")
    return lines + [_against(costs, even, answer.question) for even in costs.break_even]


def _against(costs: Costs, even: BreakEven, question: Question) -> str:
    """Compare the rented replicas with a hosted service in one line."""
    hosted = even.hosted
    what = f"  against {hosted.offer} (${even.usd_per_image:g} per image, {hosted.date}): "
    one = costs.replicas == 1
    some = "one replica" if one else f"{costs.replicas:,} replicas"
    if even.cheaper is not None and question.rate is not None:
        volume = question.rate * MINUTES_PER_MONTH
        verdict = "cheaper" if even.cheaper else "dearer"
        return (
            f"{what}{verdict} at this rate ({volume:,.0f} images per month); {some} {'costs' if one else 'cost'} as "
            f"much as {even.images:,.0f} images there"
        )
    if even.possible:
        return f"{what}cheaper from {even.images:,.0f} images per month; {some} can generate {costs.capacity:,.0f}"
    return (
        f"{what}never cheaper: {some} would have to generate {even.images:,.0f} images per month and can generate "
        f"{costs.capacity:,.0f}"
    )


def no_price(answer: Plan) -> str:
    """Say why a plan has no costs."""
    assert answer.chosen is not None
    need = host_need(answer.question, answer.chosen)
    if not need.weights and need.cores == 1:
        return "no price known for this GPU; set one with --price"
    cores = f" and {need.cores} cores" if need.cores > 1 else ""
    return f"no offer is known to have the {gigabytes(need.memory)} of host memory{cores} that this needs; set --price"


def _basis(answer: Plan) -> str:
    found = basis(answer)
    here, near = found["points_on_this_gpu"], found["points_on_its_generation"]
    return (
        f"basis: fitted {found['calibrated']} to {found['points']} public measurements, median error "
        f"{found['held_out_median_error']:.0%} on {found['held_out_points']} held out; "
        f"{here or 'none'} of them on this GPU, {near} on its generation"
    )


def span(value: Range, digits: int | None = None) -> str:
    """Format a range as `1.74 (1.22-2.07)`."""
    low, mid, high = (
        _fixed(v, digits) if digits is not None else number(v) for v in (value.low, value.mid, value.high)
    )
    return mid if low == mid == high else f"{mid} ({low}-{high})"


def _fixed(value: float, digits: int) -> str:
    text = f"{value:,.{digits}f}"
    return text if float(text.replace(",", "")) or not value else f"<{10.0**-digits:g}"


def number(value: float) -> str:
    """Format a positive number with three significant digits and no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    if 0 < value < 0.001:
        return "<0.001"
    return f"{value:#.3g}".rstrip(".") if value else "0"


def colorize(words: str, code: str, colour: bool) -> str:
    return f"\033[{code}m{words}\033[0m" if colour else words
