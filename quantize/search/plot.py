"""Plot the Pareto front (quality over cost) and the measured over the predicted error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kit.errors import UsageError

LABELS_APART = 8.0  # minimum distance of labels, % of the cost
BLUE, RED, GREY = "#4c72b0", "#c44e52", "#888888"


def check() -> None:
    """Raise UsageError if matplotlib is missing; called before anything long runs."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError("quantize search plots its result with matplotlib: pip install matplotlib") from None


def draw(facts: Mapping[str, Any], path: Path) -> None:
    """Plot the results of a search, given as in its JSON."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    figure.suptitle(f"{facts['variant']}, recipe {facts['recipe']}: image quality by spared groups ({facts['spare']})")
    _front(axes[0], facts)
    _prediction(axes[1], facts)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="#eeeeee")
        axis.set_axisbelow(True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _front(axis: Any, facts: Mapping[str, Any]) -> None:
    points: Sequence[Mapping[str, Any]] = facts["points"]
    costs = [100 * point["cost"] for point in points]
    found = [point["metrics"]["psnr"] for point in points]
    errors = [[one["mean"] - one["low"] for one in found], [one["high"] - one["mean"] for one in found]]
    axis.errorbar(costs, [one["mean"] for one in found], yerr=errors, fmt="o-", color=BLUE, capsize=3, label="measured")
    labelled = -LABELS_APART
    for cost, one, point in zip(costs, found, points, strict=True):
        if cost - labelled >= LABELS_APART:
            label, labelled = f"{len(point['spared'])} spared", cost
            axis.annotate(label, (cost, one["mean"]), xytext=(6, -11), textcoords="offset points", fontsize=7)
    chosen = facts["chosen"]
    if chosen is not None:
        point = next(one for one in points if one["name"] == chosen)
        axis.plot([100 * point["cost"]], [point["metrics"]["psnr"]["mean"]], "o", color=RED, ms=10, label="chosen")
    for bound in facts["bounds"]:
        if bound["metric"] == "psnr":
            axis.axhline(
                bound["value"], color=RED, linestyle="--", linewidth=1, label=f"required: {bound['value']:g} dB"
            )
    axis.set_xlabel(f"{facts['cost']} spared, % of all that can be quantized")
    axis.set_ylabel("PSNR of the images, dB, mean and 95 % interval")
    axis.legend(frameon=False, fontsize=8)


def _prediction(axis: Any, facts: Mapping[str, Any]) -> None:
    recipes = [(point["predicted"], point["latents"]) for point in facts["points"] if point["predicted"] > 0]
    alone = [(one["predicted"], one["latents"]) for one in facts["alone"]]
    for pairs, mark, colour, label in (
        (recipes, "o", BLUE, "recipes of the front"),
        (alone, "^", RED, "one group quantized alone"),
    ):
        if pairs:
            axis.plot(*zip(*pairs, strict=True), mark, color=colour, label=label)
    ends = [value for pair in (*recipes, *alone) for value in pair if value > 0]
    if ends:
        axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color=GREY, linewidth=1, label="as predicted")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("predicted relative squared error of the final latents")
    axis.set_ylabel("the same, measured")
    correlation = facts["rank_correlation"]["predicted, latents"]
    if correlation is not None:
        axis.set_title(f"groups alone: Spearman's rank correlation {correlation:.2f}", fontsize=9)
    axis.legend(frameon=False, fontsize=8)
