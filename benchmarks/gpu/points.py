"""Convert measured rows to the planner's format for public measurements (planner/measurements.py), to fit it to them.

A point is one image at a time on a card and in a recipe that the planner knows; batches and modes without a
corresponding stack are left out. Each point includes the planner's current prediction.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kit.gpus import GPUS, of_device
from kit.recipes import RECIPES
from planner.measurements import Measurement, Stack
from planner.speed import calibration, predict

SOURCE = "flux2-deploy"
# The fastest of several modes with one recipe represents it, as in a deployment.
STACKS: dict[str, Stack] = {"diffusers": "eager"}
FUSED = ("compile", "graphs", "whole", "aoti", "fp8", "int8", "int8-weights", "aoti-fp8")


def points(facts: dict[str, Any]) -> dict[str, Any]:
    """Return sources and points in the format of data/measurements.json, with the planner's errors; none for a CPU."""
    device = facts.get("device", {})
    gpu = of_device(device.get("name", ""), device.get("memory_bytes", 0))
    if gpu is None or gpu.name not in GPUS or facts["settings"]["size"] != "true":
        return {"sources": {}, "points": [], "errors": []}
    best: dict[str, tuple[Measurement, str]] = {}
    for row in facts["rows"]:
        point = _point(row, facts, gpu.name)
        if point is not None and (point.id not in best or point.seconds < best[point.id][0].seconds):
            best[point.id] = point, row["date"]
    model = calibration()
    chosen = [point for point, _ in best.values()]
    versions = f"torch {device.get('torch')}, CUDA {device.get('cuda')}"
    dates = sorted({date for _, date in best.values()})
    return {
        "sources": {
            SOURCE: {
                "url": "benchmarks/results/gpu.json",
                "date": dates[-1] if dates else "",
                "note": f"python -m benchmarks gpu on {device['name']}; {versions}; random weights at true size",
            }
        },
        "points": [{k: v for k, v in asdict(point).items() if v != ""} for point in chosen],
        "errors": [{"id": p.id, "predicted_over_measured": round(predict(p, model) / p.seconds, 3)} for p in chosen],
    }


def _point(row: dict[str, Any], facts: dict[str, Any], gpu: str) -> Measurement | None:
    """Convert a row to a point, or return None."""
    what, subject, mode, *shape = row["id"].split("/")
    wanted = (what, subject) in (("part", "transformer"), ("image", "whole"))
    if row["state"] != "measured" or not wanted or len(shape) != 2 or shape[1] != "b1":
        return None
    stack: Stack | None = STACKS.get(mode) or ("fused" if mode in FUSED else None)
    recipe = next((name for name in RECIPES if name == row["recipe"]), None)
    if stack is None or recipe is None:
        return None
    side = int(shape[0].split("x")[0])
    scope, steps = ("image", int(row["steps"])) if what == "image" else ("step", 1)
    variant = facts["settings"]["variant"]
    return Measurement(
        id=f"{SOURCE}/{variant}/{gpu}/{stack}/{recipe}/{side}x{side}/{scope}",
        source=SOURCE,
        model=variant,
        gpu=gpu,
        stack=stack,
        recipe=recipe,
        width=side,
        height=side,
        steps=steps,
        scope="image" if scope == "image" else "step",
        seconds=round(row["median"], 5),
    )
