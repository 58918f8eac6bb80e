"""Recipes: which layers they name, and files of exceptions that are read whole or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit.errors import UsageError
from kit.recipes import RECIPES, Rule, find_recipe, read_recipe, write_recipe


def write(folder: Path, content: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_recipes_that_quantize_activations_need_calibration() -> None:
    assert [name for name, recipe in RECIPES.items() if recipe.needs_calibration] == [
        "fp8",
        "fp8-channel",
        "int8",
        "int8-plain",
    ]


@pytest.mark.parametrize(
    ("layer", "scheme"),
    [
        ("transformer_blocks.0.attn.to_q", "int8"),
        ("transformer_blocks.4.ff_context.linear_out", "int8"),
        ("single_transformer_blocks.19.attn.to_qkv_mlp_proj", "int8"),
        ("x_embedder", None),
        ("context_embedder", None),
        ("double_stream_modulation_img.linear", None),
        ("norm_out.linear", None),
        ("proj_out", None),
        ("time_guidance_embed.timestep_embedder.linear_1", None),
    ],
)
def test_blocks_are_quantized_and_nothing_else(layer: str, scheme: str | None) -> None:
    assert RECIPES["int8"].scheme("transformer", layer) == scheme
    assert RECIPES["bf16"].scheme("transformer", layer) is None


def test_int8_spares_the_activations_with_the_largest_outliers() -> None:
    assert RECIPES["int8"].scheme("text_encoder", "layers.3.mlp.down_proj") == "int8-weights"
    assert RECIPES["int8"].scheme("text_encoder", "layers.3.mlp.up_proj") == "int8"
    assert RECIPES["int8"].scheme("vae_decoder", "layers.3.mlp.up_proj") is None


def test_rules_of_a_file_go_before_those_of_its_base(tmp_path: Path) -> None:
    rules = (
        Rule("transformer", "transformer_blocks.0.*", "keep"),
        Rule("transformer", "*.attn.to_out*", "int8-weights"),
    )
    write_recipe(tmp_path / "r.json", "int8", "careful", rules)
    recipe = find_recipe(str(tmp_path / "r.json"))
    assert (recipe.name, recipe.smooth, recipe.percentile) == ("careful", True, 100.0)
    assert recipe.scheme("transformer", "transformer_blocks.0.attn.to_q") is None
    assert recipe.scheme("transformer", "transformer_blocks.1.attn.to_out.0") == "int8-weights"
    assert recipe.scheme("transformer", "transformer_blocks.1.attn.to_q") == "int8"
    assert recipe.needs_calibration
    assert (recipe.math, recipe.weight_bits) == ("int8", 8), "exceptions do not change what the blocks count as"


def test_a_file_replaces_percentile_and_smoothing_and_is_named_after_itself(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path, {"base": "int8", "smooth": False, "percentile": 99.9}))
    assert (recipe.name, recipe.smooth, recipe.percentile) == ("mine", False, 99.9)
    assert recipe.rules == RECIPES["int8"].rules


def test_an_unknown_recipe_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown recipe 'fp5'; there are: fp32, bf16, fp8, .*, or a JSON file"):
        find_recipe("fp5")
    with pytest.raises(UsageError, match=r"recipe .*none\.json: No such file or directory"):
        find_recipe(str(tmp_path / "none.json"))


RULE = {"part": "transformer", "layers": "*", "scheme": "keep"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ([], "unknown key no object"),
        (
            {"base": "int8", "rulez": []},
            "unknown key rulez; there are: attention, base, name, percentile, rules, smooth",
        ),
        ({}, "unknown base None; there are: fp32, bf16"),
        ({"base": ["int8"]}, r"unknown base \['int8'\]"),
        ({"base": "fp8", "attention": "int8"}, "attention .int8. is neither"),
        ({"base": "int8", "rules": "all"}, "rules 'all' has the wrong type"),
        ({"base": "int8", "rules": ["all"]}, "a rule has part, layers and scheme, not 'all'"),
        ({"base": "int8", "rules": [{"part": "transformer"}]}, "a rule has part, layers and scheme, not {'part'"),
        (
            {"base": "int8", "rules": [RULE | {"part": "vae_decoder"}]},
            "part 'vae_decoder' cannot be quantized; text_encoder and transformer can",
        ),
        ({"base": "int8", "rules": [RULE | {"scheme": "int5"}]}, "unknown scheme 'int5'; there are: keep, fp8, "),
        ({"base": "int8", "rules": [RULE | {"scheme": ["keep"]}]}, r"unknown scheme \['keep'\]"),
        ({"base": "int8", "smooth": 1}, "smooth 1 has the wrong type"),
        ({"base": "int8", "percentile": True}, "percentile True has the wrong type"),
        ({"base": "int8", "percentile": 50}, "percentile 50.0 is not between 90 and 100"),
        ('{"base": "int8", "percentile": NaN}', "percentile nan is not between 90 and 100"),
    ],
)
def test_a_malformed_file_is_refused_by_file_and_key(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UsageError, match=rf"recipe .*mine\.json: {message}"):
        read_recipe(write(tmp_path, content))
