"""Read the dated price data of GPUs per hour and hosted images per megapixel, which the user can replace."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median
from typing import Any

from kit.errors import UsageError
from kit.gpus import GPUS
from kit.variants import VARIANTS

HOURS_PER_MONTH = 730.0
MEGAPIXEL = 1024 * 1024


@dataclass(frozen=True)
class Offer:
    """A price for one hour of a GPU."""

    offer: str
    usd_per_hour: float
    date: str
    source: str


@dataclass(frozen=True)
class Hosted:
    """A price of images from a hosted service."""

    offer: str
    usd_per_megapixel: float
    date: str
    source: str
    steps: int | None = None  # set if the service runs a different number of steps than the variant

    def usd_per_image(self, pixels: int) -> float:
        return self.usd_per_megapixel * max(1.0, pixels / MEGAPIXEL)


@dataclass(frozen=True)
class Prices:
    """All offers, by GPU and by variant."""

    gpus: Mapping[str, tuple[Offer, ...]]
    hosted: Mapping[str, tuple[Hosted, ...]]

    def per_hour(self, gpu: str) -> tuple[float, float, float] | None:
        """Return the lowest, median and highest price of a GPU; None if no offer is known."""
        offers = sorted(offer.usd_per_hour for offer in self.gpus.get(gpu, ()))
        return (offers[0], median(offers), offers[-1]) if offers else None


def read_prices(path: Path | None = None) -> Prices:
    """Read the kit's price table, or the user's own in the same format.

    Raises UsageError, naming the file and the key, if it is invalid.
    """
    where = str(path) if path else "the kit's price table"
    try:
        text = path.read_text() if path else resources.files("planner.data").joinpath("prices.json").read_text()
        raw = json.loads(text)
    except FileNotFoundError:
        raise UsageError(f"{where}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{where}: expected an object with `gpus` and `hosted`")
    gpus = {
        name: tuple(_entry(Offer, row, "usd_per_hour", where, f"gpus.{name}") for row in rows)
        for name, rows in _section(raw, "gpus", tuple(GPUS), where).items()
    }
    hosted = {
        name: tuple(_entry(Hosted, row, "usd_per_megapixel", where, f"hosted.{name}") for row in rows)
        for name, rows in _section(raw, "hosted", tuple(VARIANTS), where).items()
    }
    return Prices(gpus, hosted)


def _section(raw: Mapping[str, Any], key: str, known: tuple[str, ...], where: str) -> Mapping[str, list[Any]]:
    section = raw.get(key, {})
    if not isinstance(section, dict) or not all(isinstance(rows, list) for rows in section.values()):
        raise UsageError(f"{where}: {key} must map names to lists of offers")
    for name in section:
        if name not in known:
            raise UsageError(f"{where}: unknown name {name!r} in {key}; there are: {', '.join(known)}")
    return section


def _entry(cls: type[Any], row: Any, price: str, where: str, key: str) -> Any:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: {key}: an offer must be an object, not {row!r}")
    try:
        entry = cls(**row)
    except TypeError as error:
        raise UsageError(f"{where}: {key}: {error}") from None
    value = getattr(entry, price)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
        raise UsageError(f"{where}: {key}: {price} {value!r} is not a price")
    return entry
