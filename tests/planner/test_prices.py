"""The price table is complete, dated and replaceable, and user-written tables are checked strictly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.errors import UsageError
from kit.gpus import GPUS
from kit.variants import VARIANTS
from planner.prices import Hosted, read_prices


def test_every_gpu_but_two_has_a_price_with_a_date_and_a_source() -> None:
    prices = read_prices()
    assert set(GPUS) - set(prices.gpus) == {"a40", "a6000"}  # no dated offer is known
    assert set(prices.hosted) == set(VARIANTS)
    for offers in prices.gpus.values():
        assert all(offer.date.startswith("2026-") and offer.source for offer in offers)
    for services in prices.hosted.values():
        assert all(hosted.date.startswith("2026-") and hosted.source for hosted in services)
    low, mid, high = prices.per_hour("h100") or (0, 0, 0)
    assert 0 < low <= mid <= high


def test_extra_megapixels_cost_and_small_images_cost_one() -> None:
    hosted = Hosted("x", 0.01, "2026-01-01", "y")
    assert hosted.usd_per_image(2048 * 1024) == pytest.approx(0.02)
    assert hosted.usd_per_image(512 * 512) == 0.01


def write(folder: Path, content: Any) -> Path:
    path = folder / "prices.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


OFFER = {"offer": "mine", "usd_per_hour": 0.5, "date": "2026-11-25", "source": "invoice"}


def test_the_users_table_replaces_the_kits(tmp_path: Path) -> None:
    prices = read_prices(write(tmp_path, {"gpus": {"l4": [OFFER]}}))
    assert prices.per_hour("l4") == (0.5, 0.5, 0.5)
    assert prices.per_hour("h100") is None


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
        ({"gpus": {"l4": ["cheap"]}}, "gpus.l4: an offer must be an object"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read_prices(write(tmp_path, content))


def test_a_missing_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere.json: no such file"):
        read_prices(tmp_path / "nowhere.json")
