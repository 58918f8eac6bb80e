"""Read the dated price data of GPUs per hour and hosted images per megapixel, which the user can replace.

An offer that states its host is used only for plans that this host can hold. One that states none is used only for
plans that keep no weights in host memory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from kit.errors import UsageError
from kit.gpus import GPUS
from kit.variants import VARIANTS

HOURS_PER_MONTH = 730.0
MEGAPIXEL = 1024 * 1024
GIB = 2**30
Kind = Literal["list", "seen"]  # an offer that can be booked, or a price between others on a market


@dataclass(frozen=True)
class Offer:
    """A price for one hour of a GPU, and the share of its host that comes with the GPU."""

    offer: str
    usd_per_hour: float
    date: str
    source: str
    memory_gib: float | None = None  # of the host, per GPU; None: not stated, or billed apart
    cores: int | None = None  # of the host, per GPU
    kind: Kind = "list"

    def holds(self, need: HostNeed) -> bool:
        """Return whether the host is known to be large enough."""
        memory = self.memory_gib is None or self.memory_gib * GIB >= need.memory
        return memory and (self.cores is None or self.cores >= need.cores)

    @property
    def stated(self) -> bool:
        """Return whether the offer states the memory of its host."""
        return self.memory_gib is not None

    @property
    def provider(self) -> str:
        """Return the first word of the offer's name."""
        return self.offer.split()[0].rstrip(",")

    def describe(self) -> str:
        """Name the offer with its host and date."""
        host = f"{self.memory_gib:g} GiB of host memory" if self.memory_gib is not None else "host not stated"
        cores = f"{self.cores} cores, " if self.cores is not None else ""
        return f"{self.offer}: {cores}{host}, {self.date}"


@dataclass(frozen=True)
class HostNeed:
    """What a plan needs of the host, per GPU."""

    memory: int  # bytes
    weights: int = 0  # bytes of weights in it
    cores: int = 1


@dataclass(frozen=True)
class Usable:
    """The offers whose host can hold a plan; `used` is the cheapest that states its host, if there is one."""

    used: Offer
    lowest: float  # dollars per GPU hour, over the cheapest usable offer of each provider
    highest: float


@dataclass(frozen=True)
class Hosted:
    """A price of images from a hosted service."""

    offer: str
    usd_per_megapixel: float
    date: str
    source: str
    steps: int | None = None  # set if the service runs a different number of steps than the variant
    usd_per_reference_megapixel: float | None = None  # None: not stated

    def usd_per_image(self, pixels: int, reference_pixels: int = 0) -> float | None:
        """Return the price of an image with references, None if the service states none for references."""
        image = self.usd_per_megapixel * max(1.0, pixels / MEGAPIXEL)
        if not reference_pixels:
            return image
        if self.usd_per_reference_megapixel is None:
            return None
        return image + self.usd_per_reference_megapixel * reference_pixels / MEGAPIXEL


@dataclass(frozen=True)
class Prices:
    """All offers, by GPU and by variant."""

    gpus: Mapping[str, tuple[Offer, ...]]
    hosted: Mapping[str, tuple[Hosted, ...]]

    def usable(self, gpu: str, need: HostNeed) -> Usable | None:
        """Return the offers of a GPU whose host can hold a plan; None if there is none.

        Prices that were only seen count if there is no list price at all; then the highest of them is used.
        """
        known = self.gpus.get(gpu, ())
        listed = [offer for offer in known if offer.kind == "list"]
        found = [offer for offer in listed or known if offer.holds(need) and (offer.stated or not need.weights)]
        if not found:
            return None
        found.sort(key=lambda offer: offer.usd_per_hour)
        cheapest: dict[str, Offer] = {}  # of each provider: a larger host than needed is no price for this plan
        for offer in found:
            cheapest.setdefault(offer.provider, offer)
        stated = [offer for offer in found if offer.stated]
        used = (stated or found)[0] if listed else found[-1]
        highest = max(offer.usd_per_hour for offer in (used, *cheapest.values()))
        return Usable(used, found[0].usd_per_hour, highest)


def read_prices(path: Path | None = None) -> Prices:
    """Read the kit's price table, or the user's own in the same format.

    Raises UsageError, naming the file and the key, if it is invalid.
    """
    where = str(path) if path else "the kit's price table"
    try:
        text = path.read_text() if path else resources.files("planner.data").joinpath("prices.json").read_text()
        raw = json.loads(text)
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}") from None
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
    _check_host(entry, where, key)
    for name in (price, "usd_per_reference_megapixel"):
        value = getattr(entry, name, None)
        if name != price and value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6:
            raise UsageError(f"{where}: {key}: {name} {value!r} is not a price")
    return entry


def _check_host(entry: Any, where: str, key: str) -> None:
    """Raise UsageError for an invalid host of an offer."""
    if not isinstance(entry, Offer):
        return
    for name in ("memory_gib", "cores"):
        value = getattr(entry, name)
        if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e6):
            raise UsageError(f"{where}: {key}: {name} {value!r} is not a positive number")
    if entry.kind not in get_args(Kind):
        raise UsageError(f"{where}: {key}: kind {entry.kind!r} is neither {' nor '.join(get_args(Kind))}")
