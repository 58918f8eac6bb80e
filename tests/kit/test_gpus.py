"""GPU specifications and the requirements of each recipe."""

from __future__ import annotations

import pytest

from kit.errors import UsageError
from kit.gpus import GPUS, MIB, gpu, of_device
from kit.recipes import RECIPES, SCHEMES, recipe


def test_the_table_holds_the_eight_gpus_and_b200_as_a_preview() -> None:
    assert list(GPUS) == ["l4", "a10g", "a100-40g", "a100-80g", "l40s", "h100", "h200", "rtx4090", "b200"]
    assert [g.name for g in GPUS.values() if g.preview] == ["b200"]
    assert all(g.source for g in GPUS.values())


def test_fp8_is_refused_on_ampere_with_the_reason_and_the_recipe_to_use() -> None:
    sentence = "fp8 needs compute capability 8.9 or newer; a10g has 8.6: use --recipe int8"
    assert gpu("a10g").refusal("fp8") == sentence
    assert [g.name for g in GPUS.values() if g.refusal("fp8")] == ["a10g", "a100-40g", "a100-80g"]


def test_every_default_recipe_runs_where_it_is_the_default() -> None:
    for g in GPUS.values():
        assert g.refusal(g.default_recipe) is None
    assert {g.name: g.default_recipe for g in GPUS.values() if g.default_recipe != "fp8"} == {
        "a10g": "int8",
        "a100-40g": "int8",
        "a100-80g": "int8",
    }


def test_formats_agree_with_the_compute_capability() -> None:
    for g in GPUS.values():
        assert g.has("fp8") == (g.compute_capability >= (8, 9))
        assert g.has("fp4") == (g.compute_capability >= (10, 0))
        assert {"fp32", "bf16", "int8"} <= set(g.precisions)
        assert g.memory_bytes < 1.08 * g.nominal_bytes


def test_an_unknown_gpu_is_refused_with_the_list() -> None:
    with pytest.raises(UsageError, match="unknown gpu 'h800'; there are: l4, a10g, a100-40g"):
        gpu("h800")


def test_an_unknown_recipe_is_refused_with_the_list() -> None:
    with pytest.raises(
        UsageError,
        match="unknown recipe 'fp5'; there are: fp32, bf16, fp8, fp8-channel, int8, int8-plain, int8-weights, int4",
    ):
        recipe("fp5")


def test_the_driver_name_and_memory_find_the_entry() -> None:
    assert of_device("NVIDIA A100-SXM4-80GB", 81920 * MIB) is gpu("a100-80g")
    assert of_device("NVIDIA A100-SXM4-40GB", 40960 * MIB) is gpu("a100-40g")
    assert of_device("NVIDIA L40S", 46068 * MIB) is gpu("l40s")
    assert of_device("NVIDIA L4", 23034 * MIB) is gpu("l4")
    assert of_device("Tesla T4", 15360 * MIB) is None


def test_bits_per_weight_are_those_that_quantize_writes() -> None:
    block = SCHEMES["int4-weights"].block
    assert RECIPES["int4-weights"].weight_bits == 4 + 32 / block  # a scale is fp32
    assert {name for name in RECIPES if RECIPES[name].weight_bits < 16} == {
        "fp8",
        "fp8-channel",
        "int8",
        "int8-plain",
        "int8-weights",
        "int4-weights",
    }
    assert {r.weight_bits for r in RECIPES.values()} == {32, 16, 8, 4.5}


def test_weight_only_recipes_multiply_in_bf16() -> None:
    assert {r.name: r.math for r in RECIPES.values()} == {
        "fp32": "fp32",
        "bf16": "bf16",
        "fp8": "fp8",
        "fp8-channel": "fp8",
        "int8": "int8",
        "int8-plain": "int8",
        "int8-weights": "bf16",
        "int4-weights": "bf16",
    }
