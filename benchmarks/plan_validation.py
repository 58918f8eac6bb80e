"""Compare the planner's times with public measurements and report the error of every point, fitted or held out.

    python -m benchmarks plan [--fit] [--by-gpu] [--save benchmarks/results/plan_validation.json] [--json]

`--fit --save FILE` repeats the fit of the calibration and writes planner/data/calibration.json. `--by-gpu` answers a
harder question: the error on each GPU if all of its points are left out of a fit to all others, held out or not. The
bar is a median absolute error of at most 20 % over the held-out points; otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import planner.data
from benchmarks import deployment_table, machine, plan_fit, reference_speedup
from kit.errors import CheckFailed, UsageError
from kit.recipes import RECIPES, recipe
from kit.variants import VARIANTS
from planner.boards import board
from planner.measurements import Measurement, load, measurements, split
from planner.memory import Shape
from planner.speed import Calibration, calibration, predict
from planner.work import work

BAR = 0.20
CALIBRATION = Path(planner.data.__path__[0]) / "calibration.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fit", action="store_true", help=f"repeat the fit and write {CALIBRATION.name}; needs --save")
    parser.add_argument("--by-gpu", action="store_true", help="also predict each GPU from a fit without it (15 s)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the validation; returns the facts stored in benchmarks/results/plan_validation.json."""
    fitted, held = split(measurements())
    if args.fit and args.save is None:
        raise UsageError(f"--fit rewrites planner/data/{CALIBRATION.name}; give --save FILE as well to do so")
    if args.fit:
        _fit_anew(fitted, held)
    model = calibration()
    rows = [_row(p, model, "fitted") for p in fitted] + [_row(p, model, "held out") for p in held]
    raw = load()
    facts: dict[str, Any] = {
        "benchmark": "plan_validation",
        "machine": machine.describe(),
        "bar": BAR,
        "fitted": _summary([row for row in rows if row["use"] == "fitted"]),
        "held_out": _summary([row for row in rows if row["use"] == "held out"]),
        "held_out_of_new_settings": _summary([row for row in rows if row["id"] in _new_settings(fitted, held)]),
        "points": rows,
        "by_gpu": _by_gpu([*fitted, *held]) if args.by_gpu else None,
        "ratios": _ratios(model),
        "reference_speedup": {"source": reference_speedup.SOURCE, "rows": reference_speedup.rows(model)},
        "deployment_table": deployment_table.rows(),
        "not_used": raw["not_used"],
        "sources": raw["sources"],
    }
    if facts["held_out"]["median_absolute_error"] > BAR:
        raise CheckFailed(f"median error over held-out points {facts['held_out']['median_absolute_error']:.0%} > 20 %")
    if (error := reference_speedup.median_error(facts["reference_speedup"]["rows"])) > BAR:
        raise CheckFailed(f"median error over the published gains of klein-9b-kv {error:.0%} > 20 %")
    return facts


def table(facts: dict[str, Any]) -> str:
    """Render the rows as text."""
    lines = [f"{'':8} {'measured':>9} {'predicted':>9} {'error':>6} {'in range':>8}  point"]
    for row in facts["points"]:
        lines.append(
            f"{row['use']:<8} {row['measured']:>8.3f}s {row['predicted']:>8.3f}s {row['error']:>+6.0%} "
            f"{'yes' if row['in_range'] else 'no':>8}  {row['id']}"
        )
    for use in ("fitted", "held_out", "held_out_of_new_settings"):
        own = facts[use]
        lines.append(
            f"{use.replace('_', ' ')}: {own['points']} points, median error {own['median_absolute_error']:.1%}, "
            f"mean {own['mean_absolute_error']:.1%}, largest {own['largest_absolute_error']:.0%}, "
            f"{own['in_range']} in the range"
        )
    for row in facts["by_gpu"] or ():
        lines.append(
            f"{row['gpu']} left out of the fit: {row['points']} points, median error "
            f"{row['median_absolute_error']:.0%}, predicted / measured {row['median_ratio']:.2f}"
        )
    lines += [f"{row['what']}: published {row['published']}, predicted {row['predicted']}" for row in facts["ratios"]]
    lines += ["", *reference_speedup.table(facts["reference_speedup"]["rows"])]
    lines += ["", *deployment_table.table(facts["deployment_table"])]
    return "\n".join(lines)


def _fit_anew(fitted: Sequence[Measurement], held: Sequence[Measurement]) -> None:
    """Write the calibration that ships with the kit, with its error on the held-out points."""
    found = plan_fit.fit(fitted)
    made = {
        "command": "python -m benchmarks plan --fit",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "points": len(fitted),
        "held_out_points": len(held),
        "held_out_median_error": round(median(abs(predict(p, found) / p.seconds - 1) for p in held), 4),
    }
    plan_fit.write(found, CALIBRATION, made)
    calibration.cache_clear()


def _row(point: Measurement, model: Calibration, use: str) -> dict[str, Any]:
    predicted = predict(point, model)
    return {
        "id": point.id,
        "use": use,
        "measured": point.seconds,
        "predicted": round(predicted, 4),
        "error": round(predicted / point.seconds - 1, 4),
        "in_range": model.low * predicted <= point.seconds <= model.high * predicted,
        **({"assumed": point.assumed} if point.assumed else {}),
    }


def _new_settings(fitted: Sequence[Measurement], held: Sequence[Measurement]) -> set[str]:
    """Return the ids of held-out points whose model, GPU, stack, recipe and size no fitted point has."""

    def setting(p: Measurement) -> tuple[object, ...]:
        return p.model, p.gpu, p.stack, p.recipe, p.width, p.height

    known = {setting(p) for p in fitted}
    return {p.id for p in held if setting(p) not in known}


def _by_gpu(points: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Predict each GPU from a fit to all other GPUs, if another of its generation remains."""
    found = []
    for name in dict.fromkeys(p.gpu for p in points):
        own, rest = [p for p in points if p.gpu == name], [p for p in points if p.gpu != name]
        if board(name).generation in {board(p.gpu).generation for p in rest}:
            model = plan_fit.fit_centre(rest)
            ratios = [predict(p, model) / p.seconds for p in own]
            found.append(
                {
                    "gpu": name,
                    "points": len(own),
                    "median_absolute_error": round(median(abs(ratio - 1) for ratio in ratios), 4),
                    "median_ratio": round(median(ratios), 4),
                }
            )
    return found


def _summary(own: Sequence[dict[str, Any]]) -> dict[str, Any]:
    errors = [abs(row["error"]) for row in own]
    return {
        "points": len(own),
        "median_absolute_error": round(median(errors), 4),
        "mean_absolute_error": round(mean(errors), 4),
        "largest_absolute_error": round(max(errors), 4),
        "in_range": sum(row["in_range"] for row in own),
    }


def _ratios(model: Calibration) -> list[dict[str, Any]]:
    """Compare published ratios that come without absolute figures."""
    from kit.gpus import GPUS

    dev, klein = VARIANTS["dev"], VARIANTS["klein-4b"]
    shape = Shape(1024, 1024)

    def step(gpu: str, name: str = "bf16", size: Shape = shape) -> float:
        chosen = recipe(name)
        return model.seconds(work("transformer", dev, chosen, size), GPUS[gpu], chosen, "fused")

    small = work("transformer", klein, RECIPES["bf16"], Shape(1024, 1024, 2))
    one = work("transformer", klein, RECIPES["bf16"], shape)
    h200 = GPUS["h200"]
    gain = 2 * model.seconds(one, h200, RECIPES["bf16"], "fused") / model.seconds(small, h200, RECIPES["bf16"], "fused")
    return [
        {
            "what": "dev bf16, H200 / B200 (NVIDIA, 2026-01-22)",
            "published": 1.7,
            "predicted": round(step("h200") / step("b200"), 2),
        },
        {
            "what": "throughput of batch 2 over batch 1 at 1024x1024 on H200 (sglang#22183; Qwen-Image there)",
            "published": 1.02,
            "predicted": round(gain, 2),
        },
    ]
