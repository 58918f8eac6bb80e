"""The benchmark that compares the planner with public figures, and the published deployment table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import __main__ as benchmarks
from benchmarks import plan_validation, reference_speedup
from planner.measurements import measurements, split


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert benchmarks.main(["plan", *argv, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_every_point_is_listed_with_its_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found = run(capsys, "--save", str(tmp_path / "validation.json"))
    assert {row["id"] for row in found["points"]} == {p.id for p in measurements()}
    for row in found["points"]:
        assert row["error"] == pytest.approx(row["predicted"] / row["measured"] - 1, abs=2e-3)
    assert found["held_out"]["median_absolute_error"] <= found["bar"] == 0.20
    assert json.loads((tmp_path / "validation.json").read_text())["points"] == found["points"]


def test_the_published_results_are_those_of_this_calibration(capsys: pytest.CaptureFixture[str]) -> None:
    saved = json.loads((Path(plan_validation.__file__).parent / "results" / "plan_validation.json").read_text())
    found = run(capsys)
    for key in ("points", "held_out", "fitted", "ratios", "reference_speedup", "deployment_table"):
        assert saved[key] == found[key]


def test_the_published_gains_of_klein_kv_are_predicted_though_none_was_fitted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = run(capsys)["reference_speedup"]["rows"]
    assert len(rows) == 16
    assert max(abs(row["error"]) for row in rows) < 0.13
    assert reference_speedup.median_error(rows) < 0.08


def test_a_missed_bar_is_a_failed_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_validation, "BAR", 0.01)
    assert benchmarks.main(["plan"]) == 1
    assert "median error over held-out points" in capsys.readouterr().err


def test_the_deployment_table_is_impossible_for_dev_at_its_own_steps(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["gpu"]: row for row in run(capsys)["deployment_table"] if "gpu" in row}
    for gpu, row in rows.items():
        for dev in row["dev_at_1024"]:
            if not dev["setting"].startswith("dev, 8 steps"):
                assert dev["verdict"] == "impossible as stated", (gpu, dev)


def test_most_rows_of_the_deployment_table_share_one_setting(capsys: pytest.CaptureFixture[str]) -> None:
    shared = next(row for row in run(capsys)["deployment_table"] if "shared_by_most_rows" in row)
    assert shared["shared_by_most_rows"]["dev, 8 steps, 768x768"] == ["a10g", "a100-40g", "h100"]


def test_the_table_for_people_names_every_point(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks.main(["plan"]) == 0
    said = capsys.readouterr().out
    assert all(p.id in said for p in measurements())
    assert "held out: 15 points, median error" in said


def test_held_out_points_of_new_settings_share_none_with_a_fitted_point() -> None:
    fitted, held = split(measurements())
    new = plan_validation._new_settings(fitted, held)
    assert "sglang#16055/dev/h100/fused/bf16/1024x1024/step" in new
    assert "xDiT/flux1-dev/h100/fused/bf16/1024x1024/28x" not in new


def test_a_gpu_is_predicted_from_the_others_of_its_generation() -> None:
    points = [p for p in measurements() if p.cell[0] in ("ada", "ampere") and p.stack == "fused"]
    rows = {row["gpu"]: row for row in plan_validation._by_gpu(points)}
    assert "a100-80g" not in rows  # no other point covers Ampere
    assert rows["rtx4000ada"]["median_absolute_error"] < 0.2
    assert rows["rtx4000ada"]["points"] == 1
