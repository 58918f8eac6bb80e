"""Convert a plan to plain data for `kit plan --json`."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from typing import Any

from planner.boards import board
from planner.measurements import measurements
from planner.memory import HOST_RESERVE
from planner.plan import Plan, Tried
from planner.timing import Range


def facts(answer: Plan) -> dict[str, Any]:
    """Return everything in a plan, in seconds, bytes, dollars and images per minute."""
    question, chosen = answer.question, answer.chosen
    found: dict[str, Any] = {
        "variant": question.variant.name,
        "gpu": question.gpu.name,
        "preview": question.gpu.preview,
        "width": question.width,
        "height": question.height,
        "steps": question.step_count,
        "batch": question.batch,
        "references": question.references,
        "reference_side": question.shape.reference_side if question.references else None,
        "engine": question.built.folder if question.built else None,
        "plan": chosen.choice.describe() if chosen else None,
        "tried": [_tried(t) for t in answer.tried],
        "memory": _memory(chosen) if chosen else None,
        "seconds": _seconds(chosen) if chosen and chosen.timing else None,
        "images_per_minute": _range(answer.per_minute) if answer.per_minute else None,
        "load": _load(answer),
        "costs": _costs(answer) if answer.costs else None,
        "elsewhere": list(answer.elsewhere),
        "nearest": answer.nearest,
        "basis": basis(answer),
    }
    return found | ({"note": question.note} if question.note else {})


def basis(answer: Plan) -> dict[str, Any]:
    """Return how many public measurements support the times for this GPU."""
    raw = json.loads(resources.files("planner.data").joinpath("calibration.json").read_text())
    gpu, points = answer.question.gpu, measurements()
    return {
        "calibrated": raw["date"],
        "points": raw["points"],
        "held_out_points": raw["held_out_points"],
        "held_out_median_error": raw["held_out_median_error"],
        "points_on_this_gpu": sum(p.gpu == gpu.name for p in points),
        "points_on_its_generation": sum(board(p.gpu).generation == gpu.generation for p in points),
    }


def _tried(tried: Tried) -> dict[str, Any]:
    return {
        "plan": tried.choice.describe(),
        "recipe": tried.choice.recipe.name,
        "text_encoder": tried.choice.text_encoder,
        "weights_streamed": tried.choice.streamed,
        "bytes": tried.layout.needed,
        "usable_bytes": tried.layout.usable,
        "works": tried.works,
        "why_not": tried.layout.reason,
        "image_seconds": _range(tried.timing.image) if tried.timing else None,
    }


def _memory(chosen: Tried) -> dict[str, Any]:
    layout = chosen.layout
    return {
        "weights": dict(layout.weights),
        "activations": layout.arena,
        "activations_of": layout.arena_part,
        "requests": layout.requests,
        "reference_keys_and_values": layout.cache,
        "total": layout.needed,
        "usable": layout.usable,
        "host": layout.host,
        "host_needed": layout.host + HOST_RESERVE,
        "streamed_per_step": layout.streamed,
        "streamed_for_references": layout.streamed_once,
    }


def _seconds(chosen: Tried) -> dict[str, Any]:
    timing = chosen.timing
    assert timing is not None
    return {
        "text_encoder": _range(timing.text),
        "references": _range(timing.references),
        "step": _range(timing.step),
        "vae_decoder": _range(timing.decode),
        "image": _range(timing.image),
        "step_at_dense_rate": round(timing.ceiling, 5),
        "share_of_ceiling": round(timing.ceiling / timing.step.mid, 3),
    }


def _load(answer: Plan) -> dict[str, Any] | None:
    load = answer.load
    if load is None:
        return None
    return asdict(load) | {"images_per_minute": answer.question.rate, "meets_goal": load.meets}


def _costs(answer: Plan) -> dict[str, Any]:
    costs = answer.costs
    assert costs is not None
    return {
        "offer": asdict(costs.offer),
        "usd_per_hour": _range(costs.per_hour),
        "usd_per_1000": _range(costs.per_thousand),
        "usd_per_1000_at_rate": costs.at_rate and round(costs.at_rate, 4),
        "usd_per_month": round(costs.per_month, 2),
        "replicas": costs.replicas,
        "images_per_month": round(costs.capacity),
        "break_even": [
            {
                **asdict(even.hosted),
                "images_per_month": round(even.images),
                "possible": even.possible,
                "cheaper_at_rate": even.cheaper,
            }
            for even in costs.break_even
        ],
    }


def _range(value: Range) -> list[float]:
    return [round(v, 5) for v in (value.low, value.mid, value.high)]
