"""Contracts: which files are valid, and when intervals keep a contract."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.errors import UsageError
from kit.recipes import RECIPES
from quantize.gate.contract import Bound, Contract, find, load, of_recipe, parse, shipped
from quantize.gate.intervals import Interval


def found(mean: float, low: float, high: float) -> Interval:
    return Interval(mean, low, high, prompts=40, drawings=80)


def test_a_contract_ships_for_every_recipe_and_protects_the_judge() -> None:
    assert {name for name in shipped() if "/" not in name} == RECIPES.keys()
    for recipe in shipped():
        contract = of_recipe(recipe)
        (judge,) = (bound for bound in contract.bounds if bound.metric == "judge_change")
        assert judge.when == "measured"
        assert judge.value >= -0.02
        assert contract.least_prompts >= 32
        assert contract.about


def test_the_sample_has_contracts_of_its_own_that_are_stricter() -> None:
    for name in ("fp8", "int8", "int8-weights", "int4-weights"):
        measured, general = of_recipe(name, sample=True), of_recipe(name)
        assert measured.name == f"sample/{name}"
        assert find(f"sample/{name}") == measured
        tight = {bound.metric: bound for bound in measured.bounds}
        assert {"psnr", "ssim", "flip", "colour", "latent_snr"} <= tight.keys()
        for bound in general.bounds:
            if bound.metric in ("ssim", "latent_cosine"):
                assert tight[bound.metric].value > bound.value
            if bound.metric == "flip":
                assert tight["flip"].value < bound.value
        assert tight["psnr"].tail is not None
    assert of_recipe("bf16", sample=True) == of_recipe("bf16")


def test_a_recipe_without_a_contract_needs_a_file() -> None:
    with pytest.raises(UsageError, match="there is no contract for the recipe 'fp5'; there are: bf16, fp32, fp8"):
        of_recipe("fp5")


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    content = {"format": 1, "least_prompts": 8, "bounds": {"flip": {"at_most": 0.1, "when": "measured"}}}
    (tmp_path / "c.json").write_text(json.dumps(content))
    (tmp_path / "c.toml").write_text('format = 1\nleast_prompts = 8\n[bounds.flip]\nat_most = 0.1\nwhen = "measured"\n')
    both = [load(tmp_path / name) for name in ("c.json", "c.toml")]
    assert both[0].bounds == both[1].bounds == (Bound("flip", 0.1, "measured"),)
    assert both[0].least_prompts == both[1].least_prompts == 8


def test_a_contract_is_found_by_its_file_or_by_a_recipes_name(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text("format = 1\n[bounds.ssim]\nat_least = 0.5\n")
    assert find(str(tmp_path / "mine.toml")).bounds == (Bound("ssim", 0.5),)
    assert find("int8") == of_recipe("int8")


def test_a_bound_must_hold_for_the_whole_interval() -> None:
    ssim, flip = Bound("ssim", 0.9), Bound("flip", 0.1)
    assert ssim.fault(found(0.95, 0.9, 0.97)) is None
    assert flip.fault(found(0.05, 0.02, 0.1)) is None
    assert ssim.fault(found(0.8, 0.75, 0.85)) == (
        "ssim at least 0.9: found 0.8, between 0.75 and 0.85 with 95 % confidence"
    )
    assert flip.fault(found(0.09, 0.08, 0.11)) == (
        "flip at most 0.1: found 0.09, between 0.08 and 0.11 with 95 % confidence; the mean meets it, but 40 prompts "
        "are too few to prove it"
    )


def test_a_judge_that_may_have_lost_more_than_one_point_breaks_the_contract() -> None:
    judge = Bound("judge_change", -0.01, "measured")
    assert judge.fault(found(-0.004, -0.0099, 0.001)) is None
    assert "are too few to prove it" in str(judge.fault(found(-0.004, -0.0101, 0.001)))


def test_an_unmeasured_metric_breaks_a_contract_that_always_requires_it() -> None:
    contract = Contract("mine", "", 1, (Bound("lpips", 0.1), Bound("clip_change", -1, "measured")))
    reasons = {"lpips": "the package lpips is not installed", "clip_change": "no CLIP model was given with --clip DIR"}
    assert contract.faults({}, reasons, 40) == [
        "lpips at most 0.1: not measured, because the package lpips is not installed"
    ]


def test_too_few_prompts_break_a_contract() -> None:
    contract = Contract("mine", "", 32, (Bound("ssim", 0.9),))
    assert contract.faults({"ssim": found(1, 1, 1)}, {}, 31) == [
        "31 prompts are used, the contract requires at least 32"
    ]
    assert contract.faults({"ssim": found(1, 1, 1)}, {}, 32) == []


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("format = ", "mine.toml: not valid TOML"),
        ("", "format is not 1"),
        ("format = 2", "format is not 1"),
        ("format = 1", "bounds is missing or empty"),
        ("format = 1\nleast_prompts = 0\n[bounds.ssim]\nat_least = 1", "least_prompts 0 is not a positive whole"),
        ("format = 1\nleast_prompts = true\n[bounds.ssim]\nat_least = 1", "least_prompts True is not a positive"),
        ("format = 1\nabout = 3\n[bounds.ssim]\nat_least = 1", "about 3 is not text"),
        ("format = 1\nmetrics = 3", "unknown key 'metrics'; there are: format, about, least_prompts, bounds"),
        ("format = 1\n[bounds.sim]\nat_least = 1", "unknown metric 'sim'; there are: psnr, ssim, flip"),
        ("format = 1\n[bounds.ssim]\nleast = 1", "mine.toml, ssim: unknown key 'least'; there are: at_least, at_most"),
        ("format = 1\n[bounds.ssim]\nat_most = 1", "ssim: higher is better, so its only bound is at_least"),
        ("format = 1\n[bounds.flip]\nat_least = 1", "flip: lower is better, so its only bound is at_most"),
        ("format = 1\n[bounds.flip]\nat_least = 1\nat_most = 2", "lower is better, so its only bound is at_most"),
        ("format = 1\n[bounds.ssim]\nat_least = 'x'", "at_least 'x' is not a number"),
        ("format = 1\n[bounds.ssim]\nat_least = nan", "at_least nan is not a number"),
        ("format = 1\n[bounds.ssim]\nat_least = 1\nwhen = 'ever'", "when 'ever' is not one of always, measured"),
        ("format = 1\n[bounds.ssim]\nat_least = 1\ntail = 'x'", "tail 'x' is not a number"),
        ("format = 1\n[bounds]\nssim = 1", "ssim: 1 is not a table with the keys at_least, at_most, when"),
    ],
)
def test_a_malformed_contract_is_rejected(content: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse(content, "toml", "mine.toml")


def test_a_contract_that_cannot_be_read_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="none.toml: no such file, and no contract of that name; there are: bf16"):
        find("none.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="byte 0 is not valid UTF-8"):
        load(tmp_path / "c.toml")
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(UsageError, match="format is not 1"):
        load(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(UsageError, match="not valid JSON"):
        load(tmp_path / "c.json")


def test_a_tail_bounds_the_worst_pairs_where_the_mean_says_nothing() -> None:
    bound = parse("format = 1\n[bounds.psnr]\nat_least = 40\ntail = 30", "toml", "mine").bounds[0]
    assert bound.tail_fault(30.0) is None
    assert bound.tail_fault(29.5) == "psnr at least 30 in 95 % of the pairs: found 29.5"
    flip = parse("format = 1\n[bounds.flip]\nat_most = 0.1\ntail = 0.2", "toml", "mine")
    kept = Interval(0.05, 0.04, 0.06, 100, 100)
    assert flip.faults({"flip": kept}, {}, 100, {"flip": 0.19}) == []
    assert len(flip.faults({"flip": kept}, {}, 100, {"flip": 0.21})) == 1
    assert flip.without("flip").bounds == ()


def test_a_bound_that_needs_more_prompts_fails_with_fewer_where_its_metric_is_measured() -> None:
    """Not a bound that is left out: a gate on too few prompts proves nothing, and says so."""
    few = Contract("mine", "", 8, (Bound("judge_change", -0.01, "measured", least_prompts=150),))
    (fault,) = few.faults({"judge_change": found(0, 0, 0)}, {}, 48)
    assert fault == "judge_change at least -0.01: 48 prompts are used, and its interval needs at least 150"
    assert few.faults({"judge_change": found(0, 0, 0)}, {}, 150) == []
    assert few.faults({}, {"judge_change": "the judge cannot read them"}, 48) == []
    (judge,) = (bound for bound in of_recipe("int4-weights").bounds if bound.metric == "judge_change")
    assert (judge.value, judge.least_prompts) == (-0.01, 150)
    content = "format = 1\n[bounds.flip]\nat_most = 0.1\nleast_prompts = 0\n"
    with pytest.raises(UsageError, match="mine, flip: least_prompts 0 is not a positive whole number"):
        parse(content, "toml", "mine")
