"""Gradients through all denoising steps, and the effects predicted from them, against measurements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.torch_part import TorchPart
from kit.artifact import read_manifest
from kit.recipes import KEEP, RECIPES
from kit.variants import Variant
from pipeline.request import Limits, Request, check
from quantize.calibration import record
from quantize.search.groups import ImageShape, Key
from quantize.search.probe import probing
from quantize.search.sensitivity import Model, measure
from quantize.search.subject import open_subject
from quantize.search.trajectory import Trajectory, denoise, go_back

TEXT = "a red circle on a white background"


def requests_of(variant: Variant, steps: int, count: int = 1) -> list[Request]:
    size = {"width": 64, "height": 64, "steps": steps}
    return [check({"prompt": TEXT, "seed": seed, **size}, variant, Limits()) for seed in range(count)]


@contextmanager
def shifted(layer: nn.Module, by: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, args, output: output + by(output))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("guidance", ["none", "cfg"])
def test_backpropagation_matches_finite_differences(guidance: Any, model: Model, transformer: TorchPart) -> None:
    """Through all steps after a layer; with guidance, through both passes."""
    variant = replace(model.variant, guidance=guidance)
    (request,) = requests_of(variant, steps=2)
    request = replace(request, guidance=3.0)
    shape = (variant.text_tokens, variant.transformer.joint_dim)
    rng = np.random.default_rng(1)
    embeds: dict[str, Any] = {text: rng.standard_normal(shape, np.float32) for text in (TEXT, request.negative_prompt)}
    name = "single_transformer_blocks.1.attn.to_out"
    layer: Any = transformer.linears()[name]
    pattern = torch.randn(layer.out_features, generator=torch.Generator().manual_seed(2))

    def final(size: float) -> Trajectory:
        with shifted(layer, lambda output: size * pattern):
            return denoise(transformer, variant, [request], embeds)

    size = 1e-2
    moved = torch.from_numpy(final(size).latents.astype(np.float64) - final(-size).latents) / (2 * size)
    u = (moved / moved.norm()).float()  # the direction of the largest change, well above fp32 rounding
    path = final(0.0)
    shares: list[Tensor] = []
    with probing({name: layer}, lambda layer, weight, x, gradient: shares.append((gradient * pattern).sum())):
        go_back(transformer, path, u)
    assert len(shares) == 2
    assert float(sum(shares)) == pytest.approx(float(moved.norm()), rel=0.01)


def test_probing_leaves_the_model_as_it_was(model: Model, transformer: TorchPart) -> None:
    (request,) = requests_of(model.variant, steps=1)
    embeds: dict[str, Any] = {
        TEXT: np.ones((model.variant.text_tokens, model.variant.transformer.joint_dim), np.float32)
    }
    before = denoise(transformer, model.variant, [request], embeds)
    with probing(transformer.linears(), lambda *seen: None):
        go_back(transformer, before, torch.ones(before.latents.shape))
    assert all("forward" not in layer.__dict__ for layer in transformer.linears().values())
    assert np.array_equal(denoise(transformer, model.variant, [request], embeds).latents, before.latents)


def test_effects_match_quantized_weights_in_the_model(sample_artifact: Path, seen: record.Record, model: Model) -> None:
    """The measured effect of one quantized group of the transformer against its prediction."""
    manifest = read_manifest(sample_artifact)
    image = ImageShape(16, 2, 1)
    recipe = RECIPES["int4-weights"]  # coarse, so that the effect is well above rounding
    subject = open_subject(sample_artifact, manifest, model, recipe, None, KEEP, image)
    wanted: list[Key] = [("transformer", "single_transformer_blocks.0.attn.to_qkv_mlp_proj")]
    groups = {key: group for key, group in subject.groups.items() if key in wanted}
    assert list(groups) == wanted
    requests = requests_of(model.variant, steps=2, count=12)
    effects = measure(model, groups, subject.shelves, requests, batch=12)
    found = effects[wanted[0], "quantized"]
    transformer, encoder = model.load("transformer"), model.load("text_encoder")
    tokens = model.prompts.encode(TEXT)
    inputs = {"input_ids": tokens.input_ids[None], "attention_mask": tokens.attention_mask[None]}
    embeds = {TEXT: encoder.run(inputs)["prompt_embeds"][0]}
    exact = denoise(transformer, model.variant, requests, embeds).latents
    layer: Any = transformer.linears()[wanted[0][1]]
    quantized = subject.shelves["quantized"]["transformer"][wanted[0][1]]
    layer.forward = quantized.output
    moved = denoise(transformer, model.variant, requests, embeds).latents - exact
    measured = float(np.mean((moved**2).sum((1, 2)) / (exact**2).sum((1, 2))))
    assert found.final == pytest.approx(measured, rel=0.9)  # twelve squared normal numbers scatter by 40 %
    assert found.final > measured / 3
    assert 0 < found.local < 0.1
