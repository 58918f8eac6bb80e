"""The price table is complete, dated and replaceable, and user-written tables are checked strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.errors import UsageError
from kit.gpus import GPUS
from kit.variants import VARIANTS
from planner.prices import GIB, Hosted, HostNeed, read_prices


def test_every_gpu_but_two_has_a_price_with_a_date_and_a_source() -> None:
    prices = read_prices()
    assert set(GPUS) - set(prices.gpus) == {"a40", "a6000"}  # no dated offer is known
    assert set(prices.hosted) == set(VARIANTS)
    for offers in prices.gpus.values():
        assert all(offer.date.startswith("2026-") and offer.source for offer in offers)
    for services in prices.hosted.values():
        assert all(hosted.date.startswith("2026-") and hosted.source for hosted in services)
    usable = prices.usable("h100", HostNeed(memory=0))
    assert usable is not None
    assert 0 < usable.lowest <= usable.used.usd_per_hour <= usable.highest


def test_extra_megapixels_cost_and_small_images_cost_one() -> None:
    hosted = Hosted("x", 0.01, "2026-01-01", "y")
    assert hosted.usd_per_image(2048 * 1024) == pytest.approx(0.02)
    assert hosted.usd_per_image(512 * 512) == 0.01


def test_references_cost_what_the_service_states_and_are_not_compared_if_it_states_nothing() -> None:
    hosted = Hosted("x", 0.01, "2026-01-01", "y", usd_per_reference_megapixel=0.002)
    assert hosted.usd_per_image(1024 * 1024, 3 * 1024 * 1024) == pytest.approx(0.016)
    assert Hosted("x", 0.01, "2026-01-01", "y").usd_per_image(1024 * 1024, 1024 * 1024) is None


def write(folder: Path, content: Any) -> Path:
    path = folder / "prices.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


HOSTED = {"offer": "theirs", "usd_per_megapixel": 0.01, "date": "2026-11-25", "source": "price list"}
OFFER = {"offer": "mine", "usd_per_hour": 0.5, "date": "2026-11-25", "source": "invoice"}


def test_the_users_table_replaces_the_kits(tmp_path: Path) -> None:
    prices = read_prices(write(tmp_path, {"gpus": {"l4": [OFFER]}}))
    found = prices.usable("l4", HostNeed(memory=0))
    assert found is not None
    assert (found.used.offer, found.lowest, found.highest) == ("mine", 0.5, 0.5)
    assert prices.usable("h100", HostNeed(memory=0)) is None


def offer(name: str, usd: float, memory_gib: float | None = None, **more: Any) -> dict[str, Any]:
    return OFFER | {"offer": name, "usd_per_hour": usd, "memory_gib": memory_gib} | more


def used(folder: Path, need: HostNeed, *offers: dict[str, Any]) -> str | None:
    found = read_prices(write(folder, {"gpus": {"l4": list(offers)}})).usable("l4", need)
    return found.used.offer if found else None


def test_an_offer_whose_host_is_too_small_is_not_used(tmp_path: Path) -> None:
    offers = (offer("small", 0.8, 16), offer("large", 1.3, 64, cores=16), offer("huge", 2.0, 128, cores=32))
    assert used(tmp_path, HostNeed(4 * GIB), *offers) == "small"
    assert used(tmp_path, HostNeed(40 * GIB, 36 * GIB), *offers) == "large"
    assert used(tmp_path, HostNeed(40 * GIB, 36 * GIB, cores=20), *offers) == "huge"
    assert used(tmp_path, HostNeed(200 * GIB, 196 * GIB), *offers) is None


def test_an_unstated_host_holds_no_weights_and_is_used_only_without_a_stated_one(tmp_path: Path) -> None:
    unknown = offer("unknown", 0.5)
    assert used(tmp_path, HostNeed(4 * GIB), unknown) == "unknown"
    assert used(tmp_path, HostNeed(40 * GIB, 36 * GIB), unknown) is None
    assert used(tmp_path, HostNeed(4 * GIB), unknown, offer("stated", 0.8, 16)) == "stated"


def test_prices_seen_on_a_market_are_not_mixed_with_offers(tmp_path: Path) -> None:
    seen = (offer("lowest", 0.1, kind="seen"), offer("highest", 0.4, kind="seen"))
    assert used(tmp_path, HostNeed(0), *seen) == "highest"
    assert used(tmp_path, HostNeed(0), *seen, offer("list", 0.9, 16)) == "list"


def test_a_larger_host_of_the_same_provider_does_not_widen_the_range(tmp_path: Path) -> None:
    offers = [offer("AWS small", 0.8, 16), offer("AWS large", 2.0, 128), offer("Other", 1.0, 16)]
    found = read_prices(write(tmp_path, {"gpus": {"l4": offers}})).usable("l4", HostNeed(0))
    assert found is not None
    assert (found.lowest, found.used.usd_per_hour, found.highest) == (0.8, 0.8, 1.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ([], "expected an object with `gpus` and `hosted`"),
        ({"gpus": {"h800": []}}, "unknown name 'h800' in gpus; there are: l4, a10g"),
        ({"gpus": []}, "gpus must map names to lists of offers"),
        ({"gpus": {"l4": [{"offer": "x"}]}}, "gpus.l4: .*missing 3 required"),
        ({"gpus": {"l4": [OFFER | {"usd_per_hour": -1}]}}, "usd_per_hour -1 is not a price"),
        ({"gpus": {"l4": [OFFER | {"usd_per_hour": "1"}]}}, "usd_per_hour '1' is not a price"),
        ({"gpus": {"l4": [OFFER | {"usd": 1}]}}, "gpus.l4: .*unexpected keyword argument 'usd'"),
        ({"gpus": {"l4": [OFFER | {"memory_gib": 0}]}}, "gpus.l4: memory_gib 0 is not a positive number"),
        ({"gpus": {"l4": [OFFER | {"cores": "many"}]}}, "gpus.l4: cores 'many' is not a positive number"),
        ({"gpus": {"l4": [OFFER | {"kind": "spot"}]}}, "gpus.l4: kind 'spot' is neither list nor seen"),
        (
            {"hosted": {"dev": [HOSTED | {"usd_per_reference_megapixel": "free"}]}},
            "usd_per_reference_megapixel 'free' is not a price",
        ),
        ({"gpus": {"l4": ["cheap"]}}, "gpus.l4: an offer must be an object"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_prices(write(tmp_path, content))


def test_a_missing_table_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{tmp_path}: Is a directory"):
        read_prices(tmp_path)
    with pytest.raises(UsageError, match="nowhere.json: No such file or directory"):
        read_prices(tmp_path / "nowhere.json")
