"""Compare plans of several GPUs in one table; with a rate the cheapest that meets the goal comes first."""

from __future__ import annotations

from collections.abc import Sequence

from planner.memory import gigabytes
from planner.plan import Plan
from planner.text import BOLD, DIM, RED, colorize, no_price, note, number, setting, span


def ranked(answers: Sequence[Plan]) -> list[Plan]:
    """Sort plans by cost at the requested rate, those that miss the goal and those that do not fit last.

    Prices that were only seen on a market are not ranked against offers: these plans follow the others, by their own
    cost, and then those without a price.
    """
    return sorted(answers, key=_rank)


def _rank(answer: Plan) -> tuple[int, float]:
    if answer.chosen is None:
        return 4, 0.0
    if answer.load is not None and not (answer.load.meets and answer.load.waiting):
        return 3, 0.0
    if answer.costs is None:
        return 2, 0.0
    return int(not answer.costs.listed), answer.costs.ranked


def compare(answers: Sequence[Plan], colour: bool = False) -> str:
    """Render one row per GPU."""
    question = answers[0].question
    title = f"{question.variant.name}, {setting(question)}; GB of 10^9 bytes"
    load = f"{'replicas':>8}  {'p95 s, slow end':<17}" if question.rate is not None else ""
    price = "$ per 1,000 at this rate" if question.rate is not None else "$ per 1,000"
    if question.rate is not None:
        title += f"; {question.rate:g} images per minute"
        title += f", p95 of at most {question.p95:g} s" if question.p95 is not None else ""
        title += ", cheapest first"
    head = (
        f"{'gpu':<13}{'recipe':<14}{'memory':>17}  {'s per batch':<22}{'images per minute':<22}{load}{price:<27}"
        f"{'offer':<24}how"
    )
    lines = [colorize(title, BOLD, colour), colorize(head, DIM, colour)]
    lines += [_row(answer, colour) for answer in answers]
    if any(answer.costs is not None and not answer.costs.listed for answer in answers):
        lines.append("~ a price seen on a market, not an offer: not ranked against offers")
    if any(answer.question.gpu.preview for answer in answers):
        lines.append("* preview: specifications only, not tuned")
    return "\n".join([*lines, *note(question)])


def _row(answer: Plan, colour: bool) -> str:
    gpu, chosen = answer.question.gpu, answer.chosen
    name = f"{gpu.name}{'*' if gpu.preview else ''}"
    if chosen is None or chosen.timing is None or answer.per_minute is None:
        return colorize(f"{name:<13}does not fit: {answer.tried[0].layout.reason or ''}", RED, colour)
    memory = f"{chosen.layout.needed / 1e9:.1f} of {gigabytes(chosen.layout.usable)}"
    how = chosen.choice.describe().split(", ", 1)[1]
    offer = "-"
    if answer.costs is not None:
        offer = f"{'' if answer.costs.listed else '~'}{answer.costs.offer.offer}"
    elif chosen.layout.host:
        how += f"; {no_price(answer)}"
    return (
        f"{name:<13}{chosen.choice.recipe.name:<14}{memory:>17}  {span(chosen.timing.image):<22}"
        f"{span(answer.per_minute):<22}{_load(answer)}{_cost(answer):<27}{offer:<24}{how}"
    )


def _load(answer: Plan) -> str:
    load = answer.load
    if load is None:
        return ""
    p95 = "overloaded" if load.slow is None else number(load.slow.p95)
    return f"{load.replicas:>8,}  {p95 + ('' if load.meets else ' missed'):<17}"


def _cost(answer: Plan) -> str:
    costs = answer.costs
    if costs is None:
        return "-"
    return span(costs.per_thousand, 2) if costs.at_rate is None else f"{costs.at_rate:.2f}"
