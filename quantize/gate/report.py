"""The report of the gate: a verdict over intervals, as JSON and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

import numpy as np

from kit.graph_runtimes import DEFAULT_RUNTIME
from quantize.gate.contract import Contract
from quantize.gate.drawing import Pair
from quantize.gate.intervals import Interval, interval
from quantize.gate.metrics import METRICS, Metric

REPORT = "report.json"
TAIL = 0.05  # share of the pairs that the tail leaves out


@dataclass(frozen=True)
class Row:
    """One metric over all pairs: its interval, its levels if it is a change, and its worst pair."""

    metric: Metric
    found: Interval
    levels: tuple[float, float] | None
    worst: Pair
    tail: float  # 5 % of the pairs are worse

    @property
    def worst_value(self) -> float:
        return self.worst.scores[self.metric.name].value

    @property
    def lost(self) -> bool:
        """Return whether any pair is worse than its reference; always true for metrics without levels."""
        return self.levels is None or self.worst_value < 0

    def shown(self, value: float) -> str:
        return f"{value:.{self.metric.digits}f}"


@dataclass(frozen=True)
class Report:
    """All results of a gate; `setting` describes what was compared, on which prompts, with which versions."""

    setting: Mapping[str, Any]
    rows: Mapping[str, Row]
    steps: Sequence[Interval]  # cosine of the latents after each step
    unmeasured: Mapping[str, str]
    contract: Contract
    faults: Sequence[str]
    warnings: Sequence[str]
    pairs: Sequence[Pair]

    @property
    def kept(self) -> bool:
        return not self.faults

    def facts(self) -> dict[str, Any]:
        """Return the results as plain data, without the pairs."""
        return {
            **self.setting,
            "kept": self.kept,
            "faults": list(self.faults),
            "warnings": list(self.warnings),
            "contract": asdict(self.contract),
            "metrics": {name: _row_facts(row) for name, row in self.rows.items()},
            "latent_cosine_by_step": [_interval_facts(step) for step in self.steps],
            "not_measured": dict(self.unmeasured),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the results as plain data, with every pair."""
        return {**self.facts(), "pairs": [_pair_facts(pair) for pair in self.pairs]}


def summarize(
    pairs: Sequence[Pair],
    unmeasured: Mapping[str, str],
    contract: Contract,
    setting: Mapping[str, Any],
    warnings: Sequence[str],
) -> Report:
    """Compute intervals from pairs and check them against the contract."""
    rows = {name: row for name, metric in METRICS.items() if (row := _row(metric, pairs)) is not None}
    steps = [
        interval(_by_prompt((pair, pair.cosines[step]) for pair in pairs)) for step in range(len(pairs[0].cosines))
    ]  # none where a side has no latents
    prompts = len({pair.prompt.id for pair in pairs})
    found, tails = ({name: getattr(row, what) for name, row in rows.items()} for what in ("found", "tail"))
    faults = contract.faults(found, unmeasured, prompts, tails)
    return Report(setting, rows, steps, unmeasured, contract, faults, warnings, pairs)


def _row(metric: Metric, pairs: Sequence[Pair]) -> Row | None:
    measured = [(pair, pair.scores[metric.name]) for pair in pairs if metric.name in pair.scores]
    if not measured:
        return None
    sign = 1 if metric.better == "higher" else -1
    levels = [score.levels for _, score in measured if score.levels is not None]
    return Row(
        metric,
        interval(_by_prompt((pair, score.value) for pair, score in measured), metric.grain),
        (fmean(level[0] for level in levels), fmean(level[1] for level in levels)) if levels else None,
        min(measured, key=lambda one: sign * one[1].value)[0],
        sign * float(np.quantile([sign * score.value for _, score in measured], TAIL)),
    )


def _by_prompt(values: Iterable[tuple[Pair, float]]) -> list[list[float]]:
    grouped: dict[str, list[float]] = {}
    for pair, value in values:
        grouped.setdefault(pair.prompt.id, []).append(value)
    return list(grouped.values())


def to_markdown(report: Report) -> str:
    """Return the report as Markdown."""
    setting = report.setting
    lines = [f"# {setting['candidate']['name']} against {setting['reference']['name']}: {verdict(report)}", ""]
    lines += [summary(report), ""]
    lines += [f"- Broken: {fault}" for fault in report.faults]
    lines += [f"- Warning: {warning}" for warning in report.warnings]
    lines += ["", *_table(HEAD, table(report)), "", "Levels behind the change metrics.", ""]
    levels = [(row, *row.levels) for row in report.rows.values() if row.levels]
    lines += _table(
        ("metric", "reference", "candidate"), [(r.metric.name, r.shown(a), r.shown(b)) for r, a, b in levels]
    )
    if report.steps:
        lines += ["", "Cosine of the latents after each step.", ""]
        lines += _table(("step", "mean", "95 % interval"), steps_table(report))
    lines += ["", *(f"- not measured: {name}, because {reason}" for name, reason in report.unmeasured.items()), ""]
    lines += ["Metrics:", ""]
    lines += [
        f"- {row.metric.name} ({row.metric.better} is better): {row.metric.about}" for row in report.rows.values()
    ]
    return "\n".join(lines) + "\n"


HEAD = ("metric", "mean", "95 % interval", "bound", "", "worst 5 %", "worst", "of prompt, seed")


def verdict(report: Report) -> str:
    return "contract kept" if report.kept else "contract broken"


def summary(report: Report) -> str:
    """Return one sentence about what was generated and which contract it was checked against."""
    setting = report.setting
    drawn, prompts, candidate = setting["canvas"], setting["prompts"], setting["candidate"]
    seeds = f"{setting['seeds']} seed{'' if setting['seeds'] == 1 else 's'} each"
    runtime = setting.get("runtime", DEFAULT_RUNTIME)
    run_by = "" if runtime in (None, DEFAULT_RUNTIME) else f", run by {runtime}"
    return (
        f"{prompts['count']} prompts ({prompts['spec']}, digest {prompts['digest'][:12]}), {seeds}, "
        f"{drawn['width']} x {drawn['height']} pixels, {drawn['steps']} steps, guidance {drawn['guidance']:g}; "
        f"candidate {candidate['recipe']} in {candidate['compute']}{run_by}"
        f"{', drawn by ' + candidate['url'] if 'url' in candidate else ''}, "
        f"reference {setting['reference']['recipe']} in {setting['reference']['compute']}; "
        f"contract {report.contract.name}; {setting['date']}"
    )


def table(report: Report) -> list[tuple[str, ...]]:
    """Return the rows under HEAD."""
    bounds = {bound.metric: bound for bound in report.contract.bounds}
    broken = {
        name
        for name, bound in bounds.items()
        if (row := report.rows.get(name)) and (bound.fault(row.found) or bound.tail_fault(row.tail))
    }
    return [
        (
            name,
            row.shown(row.found.mean),
            f"{row.shown(row.found.low)} to {row.shown(row.found.high)}",
            f"{bounds[name].side.replace('_', ' ')} {bounds[name].value:g}" if name in bounds else "",
            "" if name not in bounds else "broken" if name in broken else "kept",
            row.shown(row.tail),
            *(
                (row.shown(row.worst_value), f"{row.worst.prompt.id}, {row.worst.seed}")
                if row.lost
                else ("none worse", "")
            ),
        )
        for name, row in report.rows.items()
    ]


def steps_table(report: Report) -> list[tuple[str, ...]]:
    return [
        (str(number), f"{step.mean:.6f}", f"{step.low:.6f} to {step.high:.6f}")
        for number, step in enumerate(report.steps, start=1)
    ]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _interval_facts(found: Interval) -> dict[str, Any]:
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in asdict(found).items()}


def _row_facts(row: Row) -> dict[str, Any]:
    facts = _interval_facts(row.found)
    if row.levels:
        facts |= {"reference": round(row.levels[0], 6), "candidate": round(row.levels[1], 6)}
    worst = {"value": round(row.worst_value, 6), "prompt": row.worst.prompt.id, "seed": row.worst.seed}
    return {**facts, "worst_5_percent": round(row.tail, 6), "worst": worst}


def _pair_facts(pair: Pair) -> dict[str, Any]:
    return {
        "prompt": pair.prompt.id,
        "category": pair.prompt.category,
        "text": pair.prompt.text,
        "seed": pair.seed,
        **{name: round(score.value, 6) for name, score in pair.scores.items()},
        "latent_cosine_by_step": [round(value, 6) for value in pair.cosines],
    }
