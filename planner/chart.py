"""Draw plans as a PNG or SVG chart: memory, images per minute and cost per 1,000 images, with one bar per GPU.

With a rate, a plan of one GPU also gets the curve of waiting times up to the load that its replicas can carry.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kit.errors import UsageError
from kit.gpus import GB
from kit.ports import PartName
from planner.layout import Layout
from planner.parts import TRANSFORMERS
from planner.plan import Plan, service
from planner.speed import calibration
from planner.text import number, setting

FORMATS = (".png", ".svg")
CURVE = (0.05, 0.3, 0.5, 0.65, 0.75, 0.82, 0.88, 0.93)  # of the most that the replicas can carry
PARTS: Mapping[str, tuple[str, tuple[PartName, ...]]] = {  # colour, and the parts whose weights are counted
    "transformer": ("#4c72b0", TRANSFORMERS),
    "text encoder": ("#dd8452", ("text_encoder",)),
    "VAE": ("#8172b3", ("vae_encoder", "vae_decoder")),
}
ACTIVATIONS, CACHE = "#55a868", "#c44e52"


def draw(answers: Sequence[Plan], path: Path) -> None:
    """Draw the plans that work; raises UsageError for another format, a missing matplotlib, or nothing to draw."""
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"--chart {path}: the name must end in {' or '.join(FORMATS)}")
    if not path.parent.is_dir():
        raise UsageError(f"--chart {path}: No such file or directory")
    working = [answer for answer in answers if answer.chosen is not None]
    if not working:
        raise UsageError(f"--chart {path}: no plan works, so there is nothing to draw")
    try:
        from matplotlib.figure import Figure  # without pyplot: no window system, nothing to close
    except ModuleNotFoundError:
        raise UsageError("--chart needs matplotlib: pip install matplotlib") from None

    curve = len(answers) == 1 and working[0].load is not None
    rows = len(working) if len(answers) > 1 else 1
    size = (13, 1.9 + 0.55 * max(2, rows) + (3.2 if curve else 0))
    figure = Figure(figsize=size, layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(1, 1.2)) if curve else (figure,)
    axes = halves[0].subplots(1, 3, sharey=True)
    question = working[0].question
    figure.suptitle(f"{question.variant.name}, {setting(question)}: estimates, not measurements")
    _memory(axes[0], working)
    _minutes(axes[1], working)
    _dollars(axes[2], working)
    axes[0].set_ylim(len(working) - 0.4, -0.6)  # the first answer on top
    if curve:
        axes = [*axes, halves[1].subplots()]
        _waiting(axes[-1], working[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UsageError(f"--chart {path}: {error.strerror}") from None


def _memory(axis: Any, answers: Sequence[Plan]) -> None:
    names = [f"{a.question.gpu.name}\n{a.chosen.choice.recipe.name}" for a in answers if a.chosen]
    left = [0.0] * len(answers)
    for name, colour, sizes in _shares([a.chosen.layout for a in answers if a.chosen]):
        axis.barh(range(len(answers)), sizes, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    usable = [a.chosen.layout.usable / GB for a in answers if a.chosen]
    axis.barh(range(len(answers)), usable, color="none", edgecolor="#999999", label="usable")
    axis.set_yticks(range(len(answers)), names, fontsize=8)
    axis.set_xlabel("GPU memory, GB")
    axis.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)


def _minutes(axis: Any, answers: Sequence[Plan]) -> None:
    values = [a.per_minute for a in answers if a.per_minute]
    errors = [[v.mid - v.low for v in values], [v.high - v.mid for v in values]]
    axis.barh(range(len(values)), [v.mid for v in values], xerr=errors, color="#4c72b0", ecolor="#333333", capsize=3)
    axis.set_xlabel("images per minute, with range")
    axis.margins(x=0.12)
    for row, value in enumerate(values):
        axis.text(value.high, row, f"  {number(value.mid)}", va="center", fontsize=8)


def _dollars(axis: Any, answers: Sequence[Plan]) -> None:
    for row, answer in enumerate(answers):
        if answer.costs is None:
            axis.text(0, row, " no price", va="center", fontsize=8)
            continue
        value = answer.costs.per_thousand
        axis.plot([value.low, value.high], [row, row], color="#999999", linewidth=3, solid_capstyle="round")
        axis.plot([value.mid], [row], "o", color="#c44e52")
        axis.annotate(
            f"${value.mid:.2f}", (value.mid, row), (0, 7), textcoords="offset points", ha="center", fontsize=8
        )
    axis.set_xlim(left=0)
    axis.set_xlabel("$ per 1,000 images at full load, lowest to highest price")


def _waiting(axis: Any, answer: Plan) -> None:
    """Draw the 95th percentile over the rate, from idle to the most that the replicas can carry at the slow end."""
    load, replica = answer.load, service(answer, calibration())
    assert load is not None
    most = 60 * load.replicas * max(replica.gains) / replica.alone.high  # images per minute
    rates = [most * share for share in CURVE]
    ends: tuple[tuple[Literal["mid", "high"], str, str], ...] = (
        ("mid", "best estimate", "#4c72b0"),
        ("high", "slow end of the range", "#c44e52"),
    )
    for end, label, colour in ends:
        found = [(rate, replica.wait(rate / 60, load.replicas, end)) for rate in rates]
        points = [(rate, waiting.p95) for rate, waiting in found if waiting is not None]
        axis.plot(*zip(*points, strict=True), "o-", color=colour, label=label, markersize=3)
    axis.axvline(answer.question.rate, color="#333333", linewidth=1, label="requested rate")
    if load.goal is not None:
        axis.axhline(load.goal, color="#55a868", linewidth=1, label="goal")
    axis.set_ylim(bottom=0)
    some = "replica" if load.replicas == 1 else "replicas"
    axis.set_xlabel(f"images per minute, {load.replicas:,} {some}")
    axis.set_ylabel("95th percentile, s")
    axis.legend(fontsize=7, frameon=False, loc="upper left")


def _shares(layouts: Sequence[Layout]) -> Iterator[tuple[str, str, list[float]]]:
    """Yield the segments of the memory bars: name, colour, and the GB of every answer."""
    for name, (colour, parts) in PARTS.items():
        yield name, colour, [sum(one.weights.get(part, 0) for part in parts) / GB for one in layouts]
    yield "activations", ACTIVATIONS, [(one.arena + one.requests) / GB for one in layouts]
    if any(one.cache for one in layouts):
        yield "references' keys and values", CACHE, [one.cache / GB for one in layouts]
