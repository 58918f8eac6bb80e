"""One load on a server: what clients get, where the time goes, and what the planner's queue predicts for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving import loads, scrape
from benchmarks.serving.capacity import Alone
from benchmarks.serving.loads import Outcome, percentile
from benchmarks.serving.mix import RequestClass, draw
from serve.client import Client

CLIENTS = 16  # of a closed loop
PERCENTS = (50, 95, 99)


@dataclass(frozen=True)
class Terms:
    """What all loads of a run share."""

    classes: Sequence[RequestClass]
    alone: Alone
    deadlines: Sequence[float]  # in times of the median seconds of a lone request of the class
    price: float | None  # dollars per hour of the machine

    @property
    def images_per_request(self) -> float:
        total = sum(one.share for one in self.classes)
        return sum(one.share * one.images for one in self.classes) / total


@dataclass(frozen=True)
class Target:
    """A running server: the addresses of gRPC and metrics."""

    url: str
    metrics: str


def poisson(target: Target, terms: Terms, rate: float, seconds: float) -> dict[str, Any]:
    """Send a Poisson stream; `samples` are (second of arrival, position of the class, seconds or None) of each."""
    due = loads.poisson_times(rate, seconds)
    order = draw(terms.classes, len(due))
    before = scrape.read(target.metrics)
    outcomes, _ = loads.open_loop(target.url, due, lambda n: terms.classes[order[n]].request(n))
    facts = _facts(terms, outcomes, order, scrape.breakdown(before, scrape.read(target.metrics)))
    samples = [[round(at, 4), order[n], _answered(outcomes[n])] for n, at in enumerate(due)]
    return {"arrivals": "poisson", "offered_per_second": round(rate, 3), **facts, "samples": samples}


def closed(target: Target, terms: Terms, rate: float, seconds: float) -> dict[str, Any]:
    """Let clients think between requests for so long that they would send `rate` a second to an idle server."""
    order = draw(terms.classes, 100_000)
    mean = sum(one.share * terms.alone.median(one.name) for one in terms.classes)
    alone = mean / sum(one.share for one in terms.classes)
    before = scrape.read(target.metrics)
    with Client(target.url) as client:
        outcomes = loads.closed_loop(
            client,
            CLIENTS,
            seconds,
            lambda n: terms.classes[order[n]].request(n),
            think=max(CLIENTS / rate - alone, 0.001),
        )
    facts = _facts(terms, outcomes, order, scrape.breakdown(before, scrape.read(target.metrics)))
    return {"arrivals": f"{CLIENTS} clients", "offered_per_second": round(rate, 3), **facts}


def _answered(outcome: Outcome) -> float | None:
    return None if outcome.image is None else round(outcome.seconds, 4)


def _facts(terms: Terms, outcomes: Sequence[Outcome], order: Sequence[int], server: dict[str, Any]) -> dict[str, Any]:
    kinds = [terms.classes[order[outcome.number]] for outcome in outcomes]
    answered = [(one, outcome) for one, outcome in zip(kinds, outcomes, strict=True) if outcome.image is not None]
    span = max(o.sent + o.seconds for o in outcomes) - min(o.sent for o in outcomes)
    minutes = max(span, 1e-9) / 60
    wrong = sum(
        outcome.image != terms.alone.twins[one.name, one.request(outcome.number)["seed"]] for one, outcome in answered
    )
    images = sum(one.images for one, _ in answered) / minutes
    return {
        "requests": len(outcomes),
        "images_per_minute": round(images, 1),
        "latency_seconds": _percentiles([outcome.seconds for _, outcome in answered]),
        "classes": {
            one.name: _class(one, [o.seconds for kind, o in answered if kind is one], terms.alone)
            for one in terms.classes
        },
        "goodput_per_minute": {
            f"{factor:g}": round(
                sum(k.images for k, o in answered if o.seconds <= factor * terms.alone.median(k.name)) / minutes, 1
            )
            for factor in terms.deadlines
        },
        "errors": dict(Counter(outcome.sort for outcome in outcomes if outcome.image is None)),
        "images_that_differ": wrong,
        "sent_late_seconds_max": round(max(outcome.late for outcome in outcomes), 4),
        "dollars_per_1000_images": round(terms.price / (images * 60) * 1000, 4) if terms.price and images else None,
        "server": server,
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    return {f"p{percent}": percentile(seconds, percent) for percent in PERCENTS}


def _class(one: RequestClass, seconds: Sequence[float], alone: Alone) -> dict[str, Any]:
    found = _percentiles(seconds)
    lone = percentile(alone.seconds[one.name], 95) or 1.0
    over = None if found["p95"] is None else round(found["p95"] / lone, 2)
    return {"requests": len(seconds), **found, "p95_over_lone_p95": over}
