"""Quantized linear layers in torch are accurate to their format and replace only the layers that recipes quantize."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.gpu.cases import shrink
from benchmarks.gpu.weights import random_part
from export.aoti import RECIPES
from export.aoti.linears import FP8, FP8_MAX, INT8_MAX, LINEARS, QuantizedLinear, quantize_linears, to_rows
from kit.errors import UsageError
from kit.recipes import recipe as kit_recipe
from kit.variants import VARIANTS


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize(("recipe", "bound"), [("fp8", 0.045), ("int8", 0.02), ("int8-weights", 0.012)])
def test_a_quantized_linear_is_as_near_as_its_format_allows(recipe: str, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    x = torch.randn(2, 20, 64, generator=generator) * torch.logspace(-2, 2, 20).reshape(1, 20, 1)  # very different rows
    found, wanted = LINEARS[recipe](weight)(x), nn.functional.linear(x, weight)
    assert found.shape == wanted.shape
    assert 1e-4 < relative(found, wanted) < bound
    for row in range(20):  # one scale per token: small rows are as accurate as large ones
        assert relative(found[:, row], wanted[:, row]) < 2 * bound


def test_a_row_of_zeros_stays_zero() -> None:
    rows, scale = to_rows(torch.zeros(2, 4), FP8_MAX, FP8)
    assert not rows.float().any()
    assert torch.isfinite(scale).all()


def test_the_largest_value_of_a_row_is_kept_exactly() -> None:
    x = torch.tensor([[1.0, -3.0, 0.5]])
    rows, scale = to_rows(x, INT8_MAX, torch.int8)
    assert rows.tolist() == [[42, -127, 21]]
    assert (rows.float() * scale)[0, 1].item() == pytest.approx(-3.0)


def test_the_linears_of_blocks_are_quantized_and_no_others() -> None:
    variant = shrink(VARIANTS["klein-4b"])
    module = random_part("transformer", variant, "fp32", "cpu")
    count = quantize_linears(module, "fp8")
    quantized = [name for name, child in module.named_modules() if isinstance(child, QuantizedLinear)]
    left = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    assert len(quantized) == count == 12 * variant.transformer.double_blocks + 2 * variant.transformer.single_blocks
    assert all("transformer_blocks." in name for name in quantized)
    assert "model.x_embedder" in left
    assert "model.single_stream_modulation.linear" in left


def test_every_recipe_that_can_be_compiled_has_a_torch_form_or_is_not_quantized() -> None:
    assert [name for name in RECIPES if kit_recipe(name).rules] == list(LINEARS)


@pytest.mark.parametrize("recipe", LINEARS)
def test_weights_quantized_while_they_are_drawn_equal_those_quantized_after(recipe: str) -> None:
    variant = shrink(VARIANTS["klein-4b"])
    after = random_part("transformer", variant, "fp32", "cpu")
    quantize_linears(after, recipe)
    streamed = random_part("transformer", variant, "fp32", "cpu", recipe).state_dict()
    assert streamed.keys() == after.state_dict().keys()
    assert all(torch.equal(streamed[name].float(), value.float()) for name, value in after.state_dict().items())


def test_a_recipe_without_a_torch_form_is_refused() -> None:
    with pytest.raises(
        UsageError, match="recipe 'int4-weights' is not available in torch; there are: bf16, fp32, fp8, "
    ):
        quantize_linears(nn.Linear(2, 2), "int4-weights")
