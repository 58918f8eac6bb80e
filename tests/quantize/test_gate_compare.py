"""Two reports of the gate side by side: what differs, and whether it is within the stated tolerance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from kit.errors import UsageError
from quantize.__main__ import main
from quantize.gate.report import REPORT
from quantize.gate.side_by_side import CALIBRATIONS, MACHINES, compare, read, table

XEON = {"name": "Xeon", "cores": 2, "features": ["avx2", "avx512_vnni"]}
EPYC = {"name": "EPYC", "cores": 2, "features": ["avx2", "avx512_vnni", "avx512_bf16"]}
SET = {"prompts": 64, "digest": "a" * 16}


def report(psnr: float, cpu: Mapping[str, Any] = XEON, calibrated_on: Any = None, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "candidate": {"name": "sample-int8", "recipe": "int8", "calibrated_on": calibrated_on},
        "reference": {"name": "sample", "recipe": "fp32"},
        "prompts": {"spec": "sample:200", "digest": "d", "count": 200},
        "seeds": 1,
        "canvas": {"width": 128, "height": 128, "steps": 4, "guidance": 1.0},
        "cpu": cpu,
        "metrics": {
            "psnr": {"mean": psnr, "low": psnr - 0.5, "high": psnr + 0.5},
            "flip": {"mean": 0.01, "low": 0.009, "high": 0.011},
        },
    }
    return found | changes


def saved(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_two_machines_are_shown_with_their_instruction_sets_and_kept_within_the_tolerance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [saved(tmp_path, f"{i}.json", one) for i, one in enumerate((report(53.2), report(52.8, EPYC)))]
    assert main(["compare", *map(str, files)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu: Xeon, 2 cores, avx2 avx512_vnni | EPYC, 2 cores, avx2 avx512_vnni avx512_bf16"
    assert lines[2].split() == [
        *("psnr", "53.20", "(52.70", "to", "53.70)", "52.80", "(52.30", "to", "53.30)", "-0.40"),
        *("0.5,", "kept;", "intervals", "overlap"),
    ]
    assert lines[3].split()[-2:] == ["intervals", "overlap"]


def test_what_exceeds_the_tolerance_fails_and_names_the_settings_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [saved(tmp_path, f"{i}.json", one) for i, one in enumerate((report(53.2), report(50.0, EPYC)))]
    assert main(["compare", *map(str, files), "--json"]) == 1
    out, err = capsys.readouterr()
    assert "the psnr differs by 3.20, more than the tolerance of 0.5; these settings differ: cpu" in err
    facts = json.loads(out.splitlines()[-1])
    assert facts["kept"] is False
    psnr = facts["metrics"][0]
    assert (psnr["change"], psnr["overlap"], psnr["kept"]) == (-3.2, False, False)
    assert "exceeded; intervals apart" in table(compare(*map(read, files)))
    same = [saved(tmp_path, f"{i}.json", report(psnr)) for i, psnr in enumerate((53.2, 50.0))]
    assert main(["compare", *map(str, same)]) == 1
    assert "more than the tolerance of 0.5; no setting differs" in capsys.readouterr().err


def test_other_calibration_prompts_have_their_own_tolerance() -> None:
    other = SET | {"digest": "b" * 16}
    for first, second, tolerance in ((SET, SET, MACHINES), (SET, other, CALIBRATIONS), (SET, None, MACHINES)):
        found = compare(report(53.2, calibrated_on=first), report(52.4, calibrated_on=second))
        assert found.differences[0].tolerance == tolerance
        assert found.kept == (tolerance == CALIBRATIONS)


def test_reports_on_other_prompts_or_sizes_are_refused() -> None:
    canvas = {"width": 256, "height": 128, "steps": 4, "guidance": 1.0}
    with pytest.raises(UsageError, match="the reports have different canvas, width 128, .* and width 256, .* so they"):
        compare(report(53.2), report(53.2, canvas=canvas))
    with pytest.raises(UsageError, match="different seeds, 1 and 2, so they cannot be compared"):
        compare(report(53.2), report(53.2, seeds=2))


def test_a_file_that_is_no_report_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.json: No such file or directory"):
        read(tmp_path / "nowhere.json")
    for content in ("{", "[]", '{"metrics": {}}'):
        with pytest.raises(UsageError, match=r"a\.json: not a report of the gate"):
            read(saved(tmp_path, "a.json", content))
    saved(tmp_path, REPORT, report(53.2))
    assert read(tmp_path)["seeds"] == 1
