"""Which plots the results page has, each from the results that it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.report.svg import Series, bars, lines

Results = Mapping[str, Any]  # facts by the name of the file without .json
ENGINES = "engine_"  # results of `benchmarks engine`, one for each number of rows


def latency(results: Results) -> str | None:
    """Draw the p95 of every class of requests over the load, measured and as the planner's queue predicts it."""
    if "serving" not in results:
        return None
    rows = [row for row in results["serving"]["loads"] if "planner" in row]
    series = []
    for index, name in enumerate(results["serving"]["mix"]):
        told = [(row["load"], row["planner"]["classes"][name]) for row in rows]
        measured = [(load, cell["p95"]) for load, cell in told if cell["p95"]]
        series.append(Series(name, measured, color=index))
        predicted = [(load, cell["predicted_p95"]) for load, cell in told if cell["predicted_p95"]]
        series.append(Series(f"{name}, planner", predicted, dashed=True, color=index, marks=False))
    return lines("Latency against load", "share of capacity", "p95, seconds", series)


def in_flight(results: Results) -> str | None:
    """Draw the throughput of a deployment over the requests in flight."""
    if "serving" not in results:
        return None
    capacity = results["serving"]["capacity"]
    gains = capacity["gains_by_requests_in_flight"]
    best = capacity["requests_per_second"] / max(gains)
    points = [(float(n), gain * best) for n, gain in enumerate(gains, start=1)]
    return lines(
        "Throughput against requests in flight", "requests in flight", "requests per second", [Series("mix", points)]
    )


def rows(results: Results) -> str | None:
    """Draw how many rows of the transformer each runtime does in a second over the rows of a call."""
    found: dict[str, list[tuple[float, float]]] = {}
    for facts in _engines(results):
        count = facts["case"]["rows"]
        for name, contender in facts["contenders"].items():
            found.setdefault(name, []).append((float(count), count / contender["median_seconds"]))
    if not found:
        return None
    series = [Series(name, sorted(points), color=index) for index, (name, points) in enumerate(found.items())]
    return lines("Throughput of the transformer against rows", "rows of a call", "rows per second", series)


def roofline(results: Results) -> str | None:
    """Draw the rate of every engine over the operations per byte of weights, below the machine's ceilings."""
    engines = _engines(results)
    if not engines:
        return None
    ceilings = engines[0]["ceilings"]
    bandwidth, peak = ceilings["copy_gigabytes_per_second"], ceilings["gigaflops_per_second"]["fp32"]
    found: dict[str, list[tuple[float, float]]] = {}
    for facts in engines:
        for name, contender in facts["contenders"].items():
            intensity = 1e9 * facts["gigaflop_of_a_call"] / contender["weight_bytes"]
            found.setdefault(name, []).append((intensity, contender["gigaflops_per_second"]))
    far = 2 * max(x for points in found.values() for x, _ in points)
    corner = peak / bandwidth
    series = [Series("ceiling, fp32", [(0.1, 0.1 * bandwidth), (corner, peak), (far, peak)], color=7, marks=False)]
    series += [Series(name, sorted(points), color=index) for index, (name, points) in enumerate(found.items())]
    return lines("Roofline of the transformer", "operations per byte of weights", "GFLOP per second", series, log=True)


def memory(results: Results) -> str | None:
    """Draw the peak memory of exports, of quantizing, and of engines."""
    found = []
    for name in ("export", "export_variants"):
        exports = results.get(name, {}).get("rows", [])
        found += [(f"export {row['what'].partition(':')[0]}", row["peak_rss_bytes"] / 1e9) for row in exports]
    for facts in _engines(results)[-1:]:
        found += [(name, row["peak_memory_bytes"] / 1e9) for name, row in facts["contenders"].items()]
    return bars("Peak memory", "GB", found) if found else None


def _engines(results: Results) -> list[Any]:
    found = [facts for name, facts in results.items() if name.startswith(ENGINES)]
    return sorted(found, key=lambda facts: facts["case"]["rows"])


PLOTS: Mapping[
    str, tuple[str, Callable[[Results], str | None]]
] = {  # name -> the result beside it, and how it is drawn
    "latency": ("serving", latency),
    "in_flight": ("serving", in_flight),
    "rows": (ENGINES, rows),
    "roofline": (ENGINES, roofline),
    "memory": ("export", memory),
}
