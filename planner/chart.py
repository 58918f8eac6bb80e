"""Draw plans as a PNG or SVG chart: memory, images per minute and cost per 1,000 images, with one bar per GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.errors import UsageError
from kit.gpus import GB
from planner.plan import Plan

FORMATS = (".png", ".svg")
PARTS = {"transformer": "#4c72b0", "text_encoder": "#dd8452", "vae_decoder": "#8172b3", "activations": "#55a868"}


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

    size = (13, 1.4 + 0.55 * max(3, len(working)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    question = working[0].question
    figure.suptitle(
        f"{question.variant.name}, {question.width}x{question.height}, {question.step_count} steps, "
        f"batch {question.batch}: estimates, not measurements"
    )
    _memory(axes[0], working)
    _minutes(axes[1], working)
    _dollars(axes[2], working)
    axes[0].set_ylim(len(working) - 0.4, -0.6)  # the first answer on top
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise UsageError(f"--chart {path}: {error.strerror}") from None


def _memory(axis: Any, answers: Sequence[Plan]) -> None:
    names = [f"{a.question.gpu.name}\n{a.chosen.choice.recipe.name}" for a in answers if a.chosen]
    left = [0.0] * len(answers)
    for part, colour in PARTS.items():
        sizes = [_bytes(answer, part) / GB for answer in answers]
        axis.barh(range(len(answers)), sizes, left=left, color=colour, label=part.replace("_", " "))
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    usable = [a.chosen.layout.usable / GB for a in answers if a.chosen]
    axis.barh(range(len(answers)), usable, color="none", edgecolor="#999999", label="usable")
    axis.set_yticks(range(len(answers)), names, fontsize=8)
    axis.set_xlabel("GPU memory, GB")
    axis.legend(fontsize=7, frameon=False, loc="upper right")


def _minutes(axis: Any, answers: Sequence[Plan]) -> None:
    values = [a.per_minute for a in answers if a.per_minute]
    errors = [[v.mid - v.low for v in values], [v.high - v.mid for v in values]]
    axis.barh(range(len(values)), [v.mid for v in values], xerr=errors, color="#4c72b0", ecolor="#333333", capsize=3)
    axis.set_xlabel("images per minute, with range")
    axis.margins(x=0.12)
    for row, value in enumerate(values):
        axis.text(value.high, row, f"  {value.mid:.3g}", va="center", fontsize=8)


def _dollars(axis: Any, answers: Sequence[Plan]) -> None:
    for row, answer in enumerate(answers):
        if answer.costs is None:
            axis.text(0, row, " no price", va="center", fontsize=8)
            continue
        value = answer.costs.per_thousand
        axis.plot([value.low, value.high], [row, row], color="#999999", linewidth=3, solid_capstyle="round")
        axis.plot([value.mid], [row], "o", color="#c44e52")
    axis.set_xlim(left=0)
    axis.set_xlabel("$ per 1,000 images at full load, lowest to highest price")


def _bytes(answer: Plan, part: str) -> float:
    assert answer.chosen is not None
    layout = answer.chosen.layout
    if part == "activations":
        return layout.arena + layout.requests
    return next(count for name, count in layout.weights.items() if name == part)
