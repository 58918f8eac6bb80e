"""Compute the cost of a plan: dollars per hour and per 1,000 images, and the break-even with hosted services."""

from __future__ import annotations

from dataclasses import dataclass

from kit.gpus import Gpu
from kit.variants import Variant
from planner.prices import HOURS_PER_MONTH, Hosted, Prices
from planner.timing import Range


@dataclass(frozen=True)
class BreakEven:
    """The monthly volume from which a rented GPU, running all the time, costs less than a hosted service."""

    hosted: Hosted
    usd_per_image: float
    images: float  # per month
    possible: bool  # one replica can generate that many


@dataclass(frozen=True)
class Costs:
    """Dollars."""

    per_hour: Range  # of one replica
    per_thousand: Range  # images, at full load
    at_rate: float | None  # dollars per 1,000 images at the requested rate
    per_month: float  # of one replica running all the time
    break_even: tuple[BreakEven, ...]


@dataclass(frozen=True)
class Workload:
    """What is generated, and how many images per minute."""

    variant: Variant
    pixels: int
    steps: int
    per_minute: Range


def cost(
    job: Workload, gpu: Gpu, prices: Prices, price: float | None, cards: int, rate: float | None, replicas: int
) -> Costs | None:
    """Return the costs, or None without a known price; `price` overrides the table, `rate` is the served rate."""
    listed = (price, price, price) if price is not None else prices.per_hour(gpu.name)
    if listed is None:
        return None
    hour = Range(*listed).times(cards)
    minutes = job.per_minute
    thousand = Range(
        *(
            usd / (images * 60) * 1000
            for usd, images in ((hour.low, minutes.high), (hour.mid, minutes.mid), (hour.high, minutes.low))
        )
    )
    month = hour.mid * HOURS_PER_MONTH
    return Costs(
        per_hour=hour,
        per_thousand=thousand,
        at_rate=replicas * hour.mid / (rate * 60) * 1000 if rate else None,
        per_month=month,
        break_even=tuple(
            _break_even(hosted, month, job)
            for hosted in prices.hosted.get(job.variant.name, ())
            if hosted.steps in (None, job.steps)
        ),
    )


def _break_even(hosted: Hosted, month: float, job: Workload) -> BreakEven:
    usd = hosted.usd_per_image(job.pixels)
    return BreakEven(hosted, usd, month / usd, month / usd <= job.per_minute.mid * 60 * HOURS_PER_MONTH)
