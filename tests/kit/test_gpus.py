"""GPU specifications and the requirements of each recipe."""

from __future__ import annotations

import pytest

from kit.errors import UsageError
from kit.gpus import GB, GPUS, MIB, TERA, gpu, of_device
from kit.recipes import RECIPES, SCHEMES, recipe

AMPERE = ["a10g", "a100-40g", "a100-80g", "a10", "a40", "a6000", "rtx3090"]


def test_the_table_holds_the_gpus_of_data_centers_and_desks() -> None:
    first = ["l4", "a10g", "a100-40g", "a100-80g", "l40s", "h100", "h200", "rtx4090", "b200"]
    assert list(GPUS) == [*first, "t4", "a10", "a40", "a6000", "l40", "rtx3090", "rtx5090", "rtxpro6000"]
    assert [g.name for g in GPUS.values() if g.preview] == ["b200", "rtx5090", "rtxpro6000"]
    assert all(g.source for g in GPUS.values())


def test_fp8_is_refused_on_ampere_with_the_reason_and_the_recipe_to_use() -> None:
    sentence = "fp8 needs compute capability 8.9 or newer; a10g has 8.6: use --recipe int8"
    assert gpu("a10g").refusal("fp8") == sentence
    assert sorted(g.name for g in GPUS.values() if g.refusal("fp8")) == sorted([*AMPERE, "t4"])


def test_every_default_recipe_runs_where_it_is_the_default() -> None:
    for g in GPUS.values():
        assert g.refusal(g.default_recipe) is None
    others = {g.name: g.default_recipe for g in GPUS.values() if g.default_recipe != "fp8"}
    assert others == dict.fromkeys(AMPERE, "int8") | {"t4": "fp32"}


def test_a_gpu_without_bf16_runs_no_recipe_that_computes_in_it() -> None:
    assert gpu("t4").refusal("bf16") == "bf16 needs compute capability 8.0 or newer; t4 has 7.5: use --recipe fp32"
    assert gpu("t4").refusal("int8") == (
        "int8 computes in bf16, which needs compute capability 8.0 or newer; t4 has 7.5: use --recipe fp32"
    )
    assert [name for name in RECIPES if gpu("t4").refusal(name) is None] == ["fp32"]


def test_formats_agree_with_the_compute_capability() -> None:
    for g in GPUS.values():
        assert g.has("bf16") == (g.compute_capability >= (8, 0))
        assert g.has("fp8") == (g.compute_capability >= (8, 9))
        assert g.has("fp4") == (g.compute_capability >= (10, 0))
        assert {"fp32", "int8"} <= set(g.precisions)
        assert g.memory_bytes < 1.08 * g.nominal_bytes


def test_the_rates_of_the_rtx_5090_are_those_of_its_whitepaper() -> None:
    card = gpu("rtx5090")
    expected = {"fp32": 104.8, "bf16": 209.5, "int8": 838, "fp8": 419, "fp4": 1676}
    assert {precision: rate / TERA for precision, rate in card.dense.items()} == pytest.approx(expected)
    assert (card.memory_bytes, card.bandwidth, card.watts) == (32607 * MIB, 1792 * GB, 575)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("rtx 4090", "rtx4090"),
        ("RTX-4090", "rtx4090"),
        ("GeForce RTX 4090", "rtx4090"),
        ("4090", "rtx4090"),
        ("A100", "a100-80g"),
        ("a100 40GB", "a100-40g"),
        ("A100-SXM4-80GB", "a100-80g"),
        ("a100_80g", "a100-80g"),
        ("h100-sxm", "h100"),
        ("NVIDIA H100 SXM5", "h100"),
        ("Tesla T4", "t4"),
        ("L40S", "l40s"),
        ("RTX A6000", "a6000"),
        ("RTX PRO 6000", "rtxpro6000"),
        ("rtx-pro-6000-blackwell", "rtxpro6000"),
    ],
)
def test_another_spelling_is_understood_and_said(written: str, name: str, caplog: pytest.LogCaptureFixture) -> None:
    assert gpu(written).name == name
    (record,) = caplog.records
    assert f"gpu {written!r} is taken for {name} ({GPUS[name].title})" in record.getMessage()
    assert ("the card with 40 GB is a100-40g" in record.getMessage()) == (written == "A100")


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("h100-pcie", "unknown gpu 'h100-pcie'; there are: .*; the PCIe card has about half the bandwidth"),
        ("rtx 3090 ti", "the Ti card has other rates than the rtx3090"),
        ("rtx4080", "did you mean rtx4090?"),
        ("mi300x", "unknown gpu 'mi300x'; there are: l4, a10g"),
    ],
)
def test_a_card_that_only_looks_like_one_is_refused(written: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gpu(written)


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
    assert of_device("Tesla T4", 15360 * MIB) is gpu("t4")
    assert of_device("NVIDIA A10", 23028 * MIB) is gpu("a10")
    assert of_device("NVIDIA A10G", 23028 * MIB) is gpu("a10g")
    assert of_device("NVIDIA L40", 46068 * MIB) is gpu("l40")
    assert of_device("NVIDIA RTX PRO 6000 Blackwell Server Edition", 97887 * MIB) is gpu("rtxpro6000")


@pytest.mark.parametrize(
    ("name", "mib"),
    [
        ("NVIDIA GeForce RTX 3090 Ti", 24564),
        ("NVIDIA GeForce RTX 4090 D", 24564),
        ("NVIDIA GeForce RTX 5090 Laptop GPU", 24463),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 97887),
        ("NVIDIA T400 4GB", 4096),
    ],
)
def test_a_driver_name_that_begins_like_another_is_not_taken_for_it(name: str, mib: int) -> None:
    assert of_device(name, mib * MIB) is None


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
