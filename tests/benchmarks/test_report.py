"""The results page is what the results say, and no table of the docs has a number that no result has."""

from __future__ import annotations

import json
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.report import command, plots, svg
from benchmarks.report.drift import strays
from benchmarks.report.svg import Series
from kit.errors import UsageError


def test_the_page_and_the_numbers_of_the_docs_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("cell", "known"),
    [
        ("12.2", True),  # seconds as they are
        ("12.3", False),
        ("0.68 GB", True),  # bytes in another unit
        ("99 %", True),
        ("98 %", False),
        ("1,034.9 MB", True),
        ("2 to 3", True),
    ],
)
def test_a_number_must_be_in_a_result_at_its_own_precision(cell: str, known: bool, tmp_path: Path) -> None:
    result = {"seconds": 12.15, "bytes": 680255488, "share": 0.99, "peak": [1034887168], "text": "2 to 3 calls"}
    (tmp_path / "cost.json").write_text(json.dumps(result))
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n## Cost\n\nFrom `cost.json`.\n\n| work | value 77 |\n|---|---|\n| row 55 | {cell} |\n")
    found = strays(page, tmp_path)
    assert (not found) == known
    assert all("Cost" in str(stray) for stray in found)


def test_a_section_without_a_result_is_not_checked(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("## One\n\nSee `manifest.json`.\n\n| a | b |\n|---|---|\n| c | 5 |\n")
    assert strays(page, tmp_path) == []


def test_a_result_is_shown_with_its_origin_and_without_paths_of_the_machine(tmp_path: Path) -> None:
    machine = {
        "cpu": "A CPU",
        "cores": 2,
        "memory_gb": 8,
        "date": "2026-01-01",
        "commit": "abc",
        "versions": {"x": "1"},
    }
    facts = {"machine": machine, "command": "python -m other --work /tmp/some/where", "speed": 2.5, "list": [1]}
    text = command.section("other", facts, ["![plot](plots/plot.svg)\n"])
    assert "`python -m other --work where`; A CPU; 2 cores; 8 GB; 2026-01-01; commit abc; x 1." in text
    assert "speed: 2.5" in text
    assert "plots/plot.svg" in text
    assert "<details>" not in text


def test_the_command_writes_what_is_stale_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results"
    results.mkdir()
    with pytest.raises(UsageError, match="has no results"):
        command.read_results(results)
    (results / "other.json").write_text(json.dumps({"speed": 2.5}))
    words = ["report", "--results", str(results), "--out", str(tmp_path)]
    assert main([*words, "--check"]) == 1
    assert "stale: docs/results.md; run python -m benchmarks report" in capsys.readouterr().err
    assert main(words) == 0
    assert "written: docs/results.md" in capsys.readouterr().out
    assert main(words) == 0
    assert "written" not in capsys.readouterr().out
    assert main([*words, "--check"]) == 0


def engine(rows: int) -> dict[str, Any]:
    contender = {"median_seconds": 0.1 * rows, "gigaflops_per_second": 20.0 * rows, "weight_bytes": 1e7}
    return {
        "case": {"rows": rows},
        "gigaflop_of_a_call": 0.7 * rows,
        "ceilings": {"gigaflops_per_second": {"fp32": 100.0}, "copy_gigabytes_per_second": 5.0},
        "contenders": {"ort-cpu sample": {**contender, "peak_memory_bytes": 2e8}},
    }


def test_every_plot_is_drawn_from_results_or_left_out() -> None:
    cell = {"p95": 0.2, "predicted_p95": 0.21}
    loads = [{"load": load, "planner": {"classes": {"short": cell}}} for load in (0.3, 0.8)]
    capacity = {"gains_by_requests_in_flight": [1.0, 1.5], "requests_per_second": 6.0}
    results = {
        "engine_1": engine(1),
        "engine_4": engine(4),
        "export": {"rows": [{"what": "klein-4b: all parts", "peak_rss_bytes": 6e8}]},
        "serving": {"mix": {"short": {}}, "capacity": capacity, "loads": loads},
    }
    for _, draw in plots.PLOTS.values():
        assert draw({"other": {}}) is None
        picture = draw(results)
        assert picture is not None
        xml.fromstring(picture)
        assert picture == draw(results)
    assert set(command.render(results)) == {
        Path("docs/results.md"),
        *(Path("docs/plots") / f"{name}.svg" for name in plots.PLOTS),
    }


def test_axes_begin_at_zero_and_have_round_numbers() -> None:
    assert svg._ticks([0.3, 0.95]) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert svg._ticks([37.0])[-1] >= 37
    assert svg._log_ticks([3.0, 250.0]) == [1, 10, 100, 1000]
    assert "&lt;name&gt;" in svg.lines("<name>", "x", "y", [Series("s", [(1, 1), (2, 3)])])
