"""Two results beside each other: changes are found, noise is not, and what cannot be compared is refused."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare
from kit.errors import CheckFailed, UsageError

MACHINE = {"cpu": "Xeon (avx512_vnni)", "cores": 2}


def noisy(middle: float, count: int, seed: int, spread: float = 0.02) -> list[float]:
    chance = random.Random(seed)
    return [middle * chance.lognormvariate(0, spread) for _ in range(count)]


def arguments(folder: Path, old: Any, new: Any, **options: Any) -> argparse.Namespace:
    for name, value in (("a.json", old), ("b.json", new)):
        (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    defaults = {"tolerance": 0.03, "only": "*", "any_machine": False, "json": True}
    return argparse.Namespace(old=folder / "a.json", new=folder / "b.json", **(defaults | options))


def verdicts(old: Any, new: Any, tolerance: float = 0.03) -> dict[str, str]:
    return {c.name: c.verdict for c in compare.compare(old, new, tolerance)}


def test_a_change_beyond_the_tolerance_is_found_in_either_direction() -> None:
    old = {"step_seconds": noisy(1.0, 15, 1), "images_per_second": noisy(20, 15, 2)}
    slow = {"step_seconds": noisy(1.15, 15, 3), "images_per_second": noisy(17, 15, 4)}
    assert verdicts(old, slow) == {"step_seconds": "worse", "images_per_second": "worse"}
    assert verdicts(slow, old) == {"step_seconds": "better", "images_per_second": "better"}


def test_noise_is_rarely_taken_for_a_change() -> None:
    found = [
        verdicts({"seconds": noisy(1, 9, seed, 0.05)}, {"seconds": noisy(1, 9, seed + 500, 0.05)})["seconds"]
        for seed in range(100)
    ]
    assert sum(verdict in ("better", "worse") for verdict in found) <= 5


def test_few_and_wide_samples_are_unclear_and_many_are_the_same() -> None:
    assert verdicts({"seconds": noisy(1, 4, 1, 0.3)}, {"seconds": noisy(1, 4, 2, 0.3)})["seconds"] == "unclear"
    assert verdicts({"seconds": noisy(1, 60, 1)}, {"seconds": noisy(1, 60, 2)})["seconds"] == "same"


def test_rounds_of_records_are_samples_by_name_and_single_values_have_no_verdict() -> None:
    old = {"rounds": [{"int8_seconds": v} for v in (1.0, 1.01, 0.99)], "peak_memory_mb": 700, "note": "x", "on": True}
    new = {"rounds": [{"int8_seconds": v} for v in (2.0, 2.01, 1.99)], "peak_memory_mb": 900, "rows": 4}
    found = {c.name: c for c in compare.compare(old, new, 0.03)}
    assert found["rounds/int8_seconds"].verdict == "worse"
    assert found["rounds/int8_seconds"].ratio == pytest.approx(2.0)
    assert found["peak_memory_mb"].verdict == ""
    assert set(found) == {"rounds/int8_seconds", "peak_memory_mb"}


def test_equal_samples_are_the_same() -> None:
    assert verdicts({"seconds": [1.0, 1.0, 1.0]}, {"seconds": [1.0, 1.0, 1.0]}) == {"seconds": "same"}


def test_something_worse_fails_the_command_and_names_it(tmp_path: Path) -> None:
    old, new = {"a": {"seconds": noisy(1, 9, 1)}}, {"a": {"seconds": noisy(2, 9, 2)}}
    with pytest.raises(CheckFailed, match="1 of 1 became worse: a/seconds"):
        compare.run(arguments(tmp_path, old, new))
    facts = compare.run(arguments(tmp_path, new, old))
    assert facts["comparisons"][0]["verdict"] == "better"
    assert "a/seconds" in compare.table(facts)
    with pytest.raises(UsageError, match="no number in common that matches 'b"):
        compare.run(arguments(tmp_path, new, old, only="b*"))


def test_results_of_two_machines_are_compared_only_on_demand(tmp_path: Path) -> None:
    old = {"machine": MACHINE, "seconds": noisy(1, 9, 1)}
    new = {"machine": MACHINE | {"cpu": "EPYC"}, "seconds": noisy(0.5, 9, 2)}
    with pytest.raises(UsageError, match=r"different machines: cpu Xeon \(avx512_vnni\) and EPYC"):
        compare.run(arguments(tmp_path, old, new))
    assert compare.run(arguments(tmp_path, old, new, any_machine=True))["comparisons"]


@pytest.mark.parametrize("text", ["", "[1, 2]", "{", "[" * 100000])
def test_a_file_that_is_no_result_is_refused_by_name(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere.json: No such file or directory"):
        compare.read(tmp_path / "nowhere.json")
    with pytest.raises(UsageError, match=r"a\.json: not a result of a benchmark"):
        compare.run(arguments(tmp_path, text, {"seconds": [1, 2, 3]}))


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_a_tolerance_that_is_no_share_is_refused(tolerance: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be at least 0 and less than 1"):
        compare.run(arguments(tmp_path, {"seconds": 1}, {"seconds": 1}, tolerance=tolerance))
