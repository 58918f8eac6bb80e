"""Fused forms compute the same numbers as plain ones on tiny modules, and no part depends on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.gpu.cases import shrink
from benchmarks.gpu.weights import inputs, random_part
from export.graphs.attention import HIDDEN, Attention, attend, stacked
from export.graphs.fusion import fuse_projections
from export.meta_part import meta_part
from kit.ports import PARTS, PartName, ports
from kit.variants import VARIANTS, Variant

KLEIN, DEV = shrink(VARIANTS["klein-4b"]), shrink(VARIANTS["dev"])
VARIANT_IDS = [pytest.param(KLEIN, id="klein"), pytest.param(DEV, id="dev")]


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    difference = (found - wanted).abs()
    scale = wanted.abs().max()
    assert difference.max() <= 2e-6 * scale, f"max {difference.max():.3g}, mean {difference.mean():.3g} of {scale:.3g}"


@pytest.fixture(params=VARIANT_IDS)
def variant(request: pytest.FixtureRequest) -> Variant:
    found: Variant = request.param
    return found


def transformer(variant: Variant) -> tuple[Any, dict[str, torch.Tensor]]:
    module = random_part("transformer", variant, "fp32", "cpu")
    return module, inputs("transformer", variant, 64, 2, "fp32", "cpu")


@torch.no_grad()
def test_one_product_for_queries_keys_and_values_equals_three(variant: Variant) -> None:
    module, given = transformer(variant)
    plain = module(**given)
    before = sum(p.numel() for p in module.parameters())
    blocks = module.model.transformer_blocks
    assert fuse_projections(blocks) == 2 * len(blocks)
    assert not hasattr(blocks[0].attn, "to_q")
    assert sum(p.numel() for p in module.parameters()) == before
    close(module(**given), plain)


@torch.no_grad()
def test_modulation_text_and_angles_can_be_computed_once_per_image(variant: Variant) -> None:
    module, given = transformer(variant)
    times = torch.tensor([0.9, 0.7, 0.3])
    guidance = None if "guidance" not in given else torch.full((3,), 4.0)
    mods = module.modulate(times, torch.float32, guidance)  # a whole schedule at once
    text = module.model.context_embedder(given["encoder_hidden_states"])
    ropes = module.ropes(torch.cat([given["txt_ids"], given["img_ids"]], dim=1))
    for index, time in enumerate(times):

        def pick(x: torch.Tensor, row: int = index) -> torch.Tensor:
            return x[row : row + 1]  # [1, 1, dim]: the same vectors for all rows of a batch

        one = type(mods)(
            image=[tuple(map(pick, m)) for m in mods.image],
            text=[tuple(map(pick, m)) for m in mods.text],
            single=tuple(map(pick, mods.single)),
            out=pick(mods.out),
        )
        vectors = [x for m in (*one.image, *one.text, one.single) for x in m]
        assert len(vectors) == 15
        plain = module(**(given | {"timestep": time.expand(2)}))
        close(module.run_blocks(given["hidden_states"], text, one, ropes), plain)


@torch.no_grad()
@pytest.mark.parametrize("keys", [4, 2], ids=["as many keys", "shared keys"])
@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_torchs_attention_equals_the_written_out_one(keys: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 6, 8, generator=generator)
    key, value = (torch.randn(2, keys, 6, 8, generator=generator) for _ in range(2))
    seen = torch.ones(6, 6).tril().bool() if masked else torch.ones(6, 6).bool()
    bias = torch.where(seen, 0.0, HIDDEN).expand(2, 1, 6, 6)
    forms: tuple[Attention, ...] = ("matmul", "sdpa")
    plain, fused = (attend(form, query, key, value, stacked(form, bias, 4 // keys)) for form in forms)
    close(fused, plain)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_on_a_device_that_is_not_the_cpu(part: PartName, variant: Variant) -> None:
    """The meta device stands in for a GPU: an operation on tensors of two devices fails there as well."""
    module = meta_part(part, variant, "bf16").to("meta")
    sizes = {"batch": 2, "image_tokens": 16, "latent_height": 4, "latent_width": 4}
    wired = ports(part, variant, "bf16")
    types = {"bf16": torch.bfloat16, "fp32": torch.float32, "i64": torch.int64}
    given = {p.name: torch.empty(p.shape(sizes), dtype=types[p.dtype], device="meta") for p in wired.inputs}
    with torch.no_grad():
        assert module(**given).shape == wired.outputs[0].shape(sizes)
