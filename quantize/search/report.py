"""The report of a search, as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import log10
from typing import Any

from quantize.search.find import Found, Point
from quantize.search.points import plain

SHOWN = 12  # groups in the table; all are in the JSON


def facts(found: Found) -> dict[str, Any]:
    """Return the results as plain data."""
    problem = found.problem
    order = {key: rank for rank, key in enumerate(found.rungs[-1].spared, start=1)}
    groups = [
        {
            "part": group.part,
            "name": group.name,
            "layers": list(group.layers),
            "cost": group.cost(problem.cost) / problem.total,
            "operations": group.operations,
            "bytes": group.bytes,
            "effects": {state: effect.final for (of, state), effect in found.effects.items() if of == key},
            "local_errors": {state: effect.local for (of, state), effect in found.effects.items() if of == key},
            "spared_as": order.get(key),
        }
        for key, group in problem.groups.items()
    ]
    return {
        "cost": problem.cost,
        "groups": groups,
        "ladder": [
            {"spared": len(rung.spared), "cost": rung.cost, "predicted": rung.predicted} for rung in found.rungs
        ],
        "points": [_point(point) for point in found.points],
        "chosen": found.chosen.name if found.chosen else None,
        "alone": [
            {
                "part": one.key[0],
                "name": one.key[1],
                "predicted": one.predicted,
                "local": one.local,
                "latents": one.latents,
                "images": one.images,
            }
            for one in found.alone
        ],
        "rank_correlation": found.correlations,
    }


def _point(point: Point) -> dict[str, Any]:
    return {
        "name": point.name,
        "spared": [f"{part}/{name}" for part, name in point.rung.spared],
        "cost": point.rung.cost,
        "predicted": point.rung.predicted,
        **plain(point.measured),
    }


def to_markdown(found: Mapping[str, Any]) -> str:
    """Write what `facts` gave, with its setting, for people."""
    cost = found["cost"]
    said = ", ".join(
        f"{bound['metric']} {bound['side'].replace('_', ' ')} {bound['value']:g}" for bound in found["bounds"]
    )
    lines = [f"# {found['variant']}: which layers of recipe {found['recipe']} to spare", ""]
    prompts, canvas = found["prompts"], found["canvas"]
    lines += [
        f"{prompts['count']} prompts ({prompts['spec']}, digest {prompts['digest'][:12]}), {canvas['width']} x "
        f"{canvas['height']} pixels, {canvas['steps']} steps; effects measured on {found['samples']} of them; spared "
        f"groups: {found['spare']}; required: {said or 'nothing'}; chosen: {found['chosen'] or 'nothing'}; "
        f"{found['date']}",
        "",
        "Pareto front, mean and 95 % interval against the high-precision artifact.",
        "",
    ]
    head = ("recipe", f"{cost} spared", "MB", "predicted error", "latents' error", *_metric_names(found["points"]))
    lines += _table(head, [_row(point, found["chosen"]) for point in found["points"]])
    ranked = sorted((g for g in found["groups"] if g["spared_as"]), key=lambda g: g["spared_as"])
    lines += ["", f"The groups in the order in which they are spared, {min(SHOWN, len(ranked))} of {len(ranked)}.", ""]
    lines += _table(
        ("", "part", "group", f"share of {cost}", "effect on the final latents", "error of its own output"),
        [
            (
                str(g["spared_as"]),
                g["part"],
                g["name"],
                f"{100 * g['cost']:.1f} %",
                _decibels(g["effects"]["quantized"]),
                _decibels(g["local_errors"]["quantized"]),
            )
            for g in ranked[:SHOWN]
        ],
    )
    if found["alone"]:
        lines += ["", "Groups quantized alone, everything else in high precision.", ""]
        rows = sorted(found["alone"], key=lambda one: -one["predicted"])
        lines += _table(
            (
                "part",
                "group",
                "predicted error",
                "error of its own output",
                "error of the final latents",
                "error of the images",
            ),
            [
                (
                    one["part"],
                    one["name"],
                    *(_decibels(one[name]) for name in ("predicted", "local", "latents", "images")),
                )
                for one in rows
            ],
        )
        lines += ["", *_correlations(found["rank_correlation"], len(rows))]
    return "\n".join(lines) + "\n"


def _correlations(found: Mapping[str, float | None], count: int) -> list[str]:
    parts = [f"{name}: {value:.2f}" for name, value in found.items() if value is not None]
    if not parts:
        return ["Too few groups for a rank correlation."]
    return [f"Spearman's rank correlation over {count} groups, {'; '.join(parts)}."]


def _metric_names(points: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(points[0]["metrics"])


def _row(point: Mapping[str, Any], chosen: str | None) -> tuple[str, ...]:
    return (
        f"**{point['name']}**" if point["name"] == chosen else point["name"],
        f"{100 * point['cost']:.1f} %",
        f"{point['bytes'] / 1e6:.1f}",
        _decibels(point["predicted"]),
        _decibels(point["latents"]),
        *(_shown(point["metrics"][name]) for name in point["metrics"]),
    )


def _shown(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.4g} ({found['low']:.4g} to {found['high']:.4g})"


def _decibels(error: float) -> str:
    return f"{10 * log10(error):.1f} dB" if error > 0 else "none"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
