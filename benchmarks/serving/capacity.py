"""What a server does in a second: requests alone, and its throughput with so many in flight, relative to one.

A closed loop ends with fewer and fewer requests in flight, and short ones are answered before long ones. So throughput
is counted in work, the seconds that the answered requests take alone, and the time with fewer in flight is taken at the
throughput that was measured for that many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean, median

from benchmarks.serving import loads, scrape
from benchmarks.serving.loads import Outcome
from benchmarks.serving.mix import SEEDS, RequestClass, draw
from kit.errors import CheckFailed
from planner.queueing import best_gain
from serve.client import Client

WIDTHS = (1, 2, 4, 8)  # requests in flight
Twins = Mapping[tuple[str, int], bytes]  # the image of a request that was alone, by class and seed


@dataclass(frozen=True)
class Alone:
    """Requests one after the other: their seconds by class, and their images."""

    seconds: Mapping[str, Sequence[float]]
    twins: Twins
    stages: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # mean seconds by class and stage

    def median(self, name: str) -> float:
        return median(self.seconds[name])


@dataclass(frozen=True)
class Capacity:
    """Throughput by requests in flight, in seconds of lone requests per second."""

    work: Sequence[float]  # work[n - 1] with n in flight
    mean_work: float  # of a request of the mix
    saturated: float  # requests per second of the widest closed loop, its end included
    per_call: float = 1.0  # requests that share an engine call in that loop
    step: float = 0.0  # mean seconds of an engine call with one request in flight

    @property
    def gains(self) -> list[float]:
        return [work / self.work[0] for work in self.work]

    @property
    def per_second(self) -> float:
        """Return the requests of the mix per second that the server can answer."""
        return best_gain(self.gains) * self.work[0] / self.mean_work


def measure_alone(client: Client, classes: Sequence[RequestClass], count: int, metrics: str) -> Alone:
    """Send requests of every class one after the other, after one of each seed that warms the server up.

    Raises CheckFailed if one is not answered, or if its image differs from that of the same request before.
    """
    seconds: dict[str, list[float]] = {one.name: [] for one in classes}
    stages: dict[str, Mapping[str, float]] = {}
    twins: dict[tuple[str, int], bytes] = {}

    def send(one: RequestClass, number: int) -> float:
        outcome = loads.send(client, one.request(number))
        if outcome.image is None:
            raise CheckFailed(f"a lone request of class {one.name} failed: {outcome.error}")
        if twins.setdefault((one.name, number % SEEDS), outcome.image) != outcome.image:
            raise CheckFailed(f"class {one.name}: the same request alone had another image the second time")
        return outcome.seconds

    for number in range(SEEDS):
        for one in classes:
            send(one, number)
    for one in classes if count else ():
        before = scrape.read(metrics)
        seconds[one.name] = [send(one, number) for number in range(count)]
        stages[one.name] = scrape.breakdown(before, scrape.read(metrics))["stages_seconds"]
    return Alone(seconds, twins, stages)


def measure_capacity(
    client: Client,
    classes: Sequence[RequestClass],
    alone: Alone,
    seconds: float,
    metrics: str,
    widths: Sequence[int] = WIDTHS,
) -> Capacity:
    """Run closed loops of several widths; the first of them is one client."""
    order = draw(classes, 10_000)
    work_of = {one.name: alone.median(one.name) for one in classes}
    known: dict[int, float] = {}
    saturated, servers = 0.0, []
    for width in widths:
        before = scrape.read(metrics)
        outcomes = loads.closed_loop(client, width, seconds, lambda n: classes[order[n]].request(n))
        servers.append(scrape.breakdown(before, scrape.read(metrics)))
        if failed := next((outcome for outcome in outcomes if outcome.image is None), None):
            raise CheckFailed(f"a request failed with {width} in flight: {failed.error}")
        work = sum(work_of[classes[order[outcome.number]].name] for outcome in outcomes)
        known[width] = throughput(width, work, times_in_flight(outcomes), known)
        saturated = loads.rate(outcomes)
    return Capacity(
        [interpolate(known, n) for n in range(1, max(widths) + 1)],
        fmean(work_of[classes[i].name] for i in draw(classes, 1000)),
        saturated,
        servers[-1]["requests_per_call"],
        servers[0]["step_seconds_mean"],
    )


def measure_saturated(client: Client, classes: Sequence[RequestClass], seconds: float) -> float:
    """Return the requests per second of the widest closed loop, its end included."""
    order = draw(classes, 10_000)
    return loads.rate(loads.closed_loop(client, WIDTHS[-1], seconds, lambda n: classes[order[n]].request(n)))


def times_in_flight(outcomes: Sequence[Outcome]) -> dict[int, float]:
    """Return for how many seconds so many requests were in flight."""
    events = sorted([(o.sent, 1) for o in outcomes] + [(o.sent + o.seconds, -1) for o in outcomes])
    found: dict[int, float] = {}
    count = 0
    for (at, change), (until, _) in pairwise(events):
        count += change
        found[count] = found.get(count, 0.0) + until - at
    return found


def throughput(width: int, work: float, times: Mapping[int, float], known: Mapping[int, float]) -> float:
    """Return the work per second with `width` requests in flight, given that with fewer where it is known."""
    if not known:
        return work / sum(seconds for count, seconds in times.items() if count)
    fewer = {count: seconds for count, seconds in times.items() if 0 < count <= max(known)}
    rest = work - sum(seconds * interpolate(known, count) for count, seconds in fewer.items())
    full = sum(seconds for count, seconds in times.items() if count > max(known))
    return max(rest, 0.0) / full if full else 0.0


def interpolate(known: Mapping[int, float], count: int) -> float:
    """Return the throughput with so many in flight, on a line between those that are known."""
    if count in known:
        return known[count]
    below, above = max(n for n in known if n < count), min(n for n in known if n > count)
    return known[below] + (known[above] - known[below]) * (count - below) / (above - below)
