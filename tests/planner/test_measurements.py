"""The public measurements are complete, physically possible, and split without regard to their values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kit.errors import UsageError
from planner.boards import BOARDS, board
from planner.measurements import load, measurements, split


def test_every_point_has_a_source_with_an_address_and_a_date() -> None:
    sources = load()["sources"]
    points = measurements()
    assert len({p.id for p in points}) == len(points)
    for point in points:
        assert sources[point.source]["url"].startswith("https://")
        assert sources[point.source]["date"]
        assert point.seconds > 0
    assert all(entry["what"] and entry["why"] for entry in load()["not_used"])


def test_the_split_does_not_depend_on_the_figures() -> None:
    points = measurements()
    fitted, held = split(points)
    assert {p.id for p in fitted} | {p.id for p in held} == {p.id for p in points}
    assert len(held) == 15
    shuffled = [replace(p, seconds=1 / p.seconds) for p in reversed(points)]
    assert {p.id for p in split(shuffled)[1]} == {p.id for p in held}


def test_no_source_is_fitted_and_held_out_in_one_cell() -> None:
    fitted, held = split(measurements())
    assert not {(p.source, p.cell) for p in fitted} & {(p.source, p.cell) for p in held}


def test_a_cell_with_one_source_is_fitted() -> None:
    fitted, held = split(measurements())
    assert {p.cell for p in held} <= {p.cell for p in fitted}


def test_boards_that_were_only_measured_have_names_of_their_own() -> None:
    assert board("l20") is BOARDS["l20"]
    with pytest.raises(UsageError, match="unknown board 'k80'; there are: l4, a10g"):
        board("k80")
