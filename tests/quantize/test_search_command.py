"""`quantize search` on the command line: its output, exit codes and error messages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.artifact import read_manifest
from kit.errors import CheckFailed, UsageError
from kit.recipes import KEEP, RECIPES, find_recipe
from quantize.__main__ import main
from quantize.calibration import record
from quantize.search.groups import ImageShape
from quantize.search.sensitivity import Model
from quantize.search.subject import open_subject


def words(artifact: Path, seen: Path, out: Path, *more: str) -> list[str]:
    small = [
        "--prompts",
        "sample:2",
        "--samples",
        "1",
        "--points",
        "2",
        "--width",
        "64",
        "--height",
        "64",
        "--steps",
        "1",
    ]
    source = ["--checkpoint", "sample", "--recipe", "int8", "--calibration", str(seen), "--out", str(out)]
    return ["search", str(artifact), *source, *small, *more]


def test_a_search_writes_table_plot_facts_and_a_recipe_for_apply(
    sample_artifact: Path, sample_record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found"
    assert main([*words(sample_artifact, sample_record, out, "--meet", "psnr=1"), "--json"]) == 0
    printed = capsys.readouterr().out
    facts = json.loads(printed.splitlines()[-1])
    assert facts["chosen"] == "int8-spare-0"
    assert sorted(path.name for path in out.iterdir()) == [
        "recipe.json",
        "recipes",
        "search.json",
        "search.md",
        "search.png",
    ]
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "search.md").read_text() in printed
    assert find_recipe(str(out / "recipe.json")).rules == RECIPES["int8"].rules
    whole = json.loads((out / "search.json").read_text())
    first, last = whole["points"]
    assert first["predicted"] > last["predicted"]
    assert first["metrics"]["psnr"]["mean"] <= last["metrics"]["psnr"]["mean"]
    assert first["bytes"] < last["bytes"]
    spared = find_recipe(str(out / "recipes" / f"{last['name']}.json"))
    assert spared.scheme("transformer", "transformer_blocks.0.attn.to_q") is None
    assert spared.scheme("text_encoder", "layers.0.mlp.down_proj") == "int8-weights"  # only its weights were quantized


def test_a_search_without_a_result_keeps_its_report_and_exits_with_1(
    sample_artifact: Path,
    sample_record: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from quantize.search import command as search_command

    def found(args: Any, wanted: Any, folder: Path) -> dict[str, Any]:
        (folder / "search.json").write_text("{}")
        return {"chosen": None}

    monkeypatch.setattr(search_command, "_search", found)
    monkeypatch.setattr(search_command, "_markdown", lambda facts: "")
    assert main(words(sample_artifact, sample_record, tmp_path / "out", "--meet", "psnr=99")) == CheckFailed.exit_code
    assert "no recipe found by this search meets psnr at least 99; see" in capsys.readouterr().err
    assert (tmp_path / "out" / "search.json").is_file()


def test_an_interrupted_search_leaves_nothing(
    sample_artifact: Path, sample_record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantize.search import points

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(points.Studio, "draw", interrupted)
    assert main(words(sample_artifact, sample_record, tmp_path / "out")) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--points", "1"], "--points 1 is less than 2"),
        (["--alone", "-1"], "--alone -1 is less than 0"),
        (["--recipe", "int9"], "unknown recipe 'int9'; a search starts from one of: fp32, bf16, fp8"),
        (["--recipe", "bf16"], "recipe bf16 quantizes nothing"),
        (["--meet", "lpips=0.1", "--recipe", "int8"], "cannot be measured here, because"),
        (["--device", "cuda:7"], "--device cuda:7: torch finds no CUDA GPU here"),
        (["--width", "65"], "width"),
    ],
)
def test_wrong_use_is_reported_before_anything_runs(
    more: list[str],
    message: str,
    sample_artifact: Path,
    sample_record: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words(sample_artifact, sample_record, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_matplotlib_is_reported_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from quantize.search import plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="plots its result with matplotlib: pip install matplotlib"):
        plot.check()


def test_a_checkpoint_that_is_not_the_artifacts_is_rejected(
    sample_artifact: Path, seen: record.Record, model: Model
) -> None:
    manifest = read_manifest(sample_artifact)
    binding = model.bindings["transformer"]
    layer = "transformer_blocks.0.attn.to_q.weight"
    other = replace(
        binding, tensors={**binding.tensors, layer: binding.tensors["transformer_blocks.0.attn.to_k.weight"]}
    )
    wrong = replace(model, bindings={**model.bindings, "transformer": other})
    with pytest.raises(UsageError, match="to_q in the transformer has different weights; give that checkpoint"):
        open_subject(sample_artifact, manifest, wrong, RECIPES["int8"], seen, KEEP, ImageShape(16, 1, 1))
