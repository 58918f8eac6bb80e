"""Operations and weights by formula match the real classes on the meta device and published sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3Model

from export.graphs.kv_cache import CachedGraph, ExtractGraph
from kit.checkpoint import resolve
from kit.configs import read_variant
from kit.recipes import RECIPES
from kit.variants import VARIANTS, TextEncoder, Transformer, Vae
from planner import flops
from planner.memory import Shape, cache_bytes
from planner.weights import weights

TEXT = 64


def counted(module: torch.nn.Module, *args: Any, **kwargs: Any) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*args, **kwargs)
    return int(counter.get_total_flops())


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("guidance", [True, False])
def test_the_transformers_formula_counts_what_torch_counts(guidance: bool) -> None:
    sizes = Transformer(2, 3, 4, 128, joint_dim=96, guidance_embeds=guidance)
    with torch.device("meta"):
        model = Flux2Transformer2DModel(
            num_layers=2,
            num_single_layers=3,
            num_attention_heads=4,
            attention_head_dim=128,
            joint_attention_dim=96,
            guidance_embeds=guidance,
        )
        image, text = torch.zeros(1, 256, 128), torch.zeros(1, TEXT, 96)
        measured = counted(
            model,
            hidden_states=image,
            encoder_hidden_states=text,
            timestep=torch.zeros(1),
            img_ids=torch.zeros(256, 4),
            txt_ids=torch.zeros(TEXT, 4),
            guidance=torch.zeros(1) if guidance else None,
        )
    assert flops.transformer(sizes, 256, TEXT).total == pytest.approx(measured, rel=1e-3)
    assert weights("transformer", replace(VARIANTS["dev"], transformer=sizes)).total == parameters(model)


def test_reference_tokens_lengthen_the_sequence() -> None:
    sizes = VARIANTS["klein-4b"].transformer
    assert flops.transformer(sizes, 4096, 512, 4096) == flops.transformer(sizes, 8192, 512)


def test_the_formulas_of_klein_kvs_graphs_count_what_torch_counts() -> None:
    sizes = Transformer(2, 3, 4, 128, joint_dim=96, guidance_embeds=False)
    variant = replace(VARIANTS["klein-9b-kv"], transformer=sizes)
    extract, cached = ExtractGraph(sizes, "matmul"), CachedGraph(sizes, "matmul")
    references, image, text = (torch.zeros(1, count, 128) for count in (200, 256, TEXT))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        found = extract(references, torch.zeros(1, 200, 4, dtype=torch.long))
    assert flops.extract(sizes, 200).total == pytest.approx(counter.get_total_flops(), rel=1e-3)
    ids = (torch.zeros(1, count, 4, dtype=torch.long) for count in (256, TEXT))
    cache = {str(number): tensor for number, tensor in enumerate(found)}
    measured = counted(cached, image, text[..., :96], torch.zeros(1), *ids, None, cache)
    assert flops.cached(sizes, 256, TEXT, 200).total == pytest.approx(measured, rel=1e-3)
    stored = sum(tensor.numel() for tensor in found) * 2
    shape = Shape(256, 256, references=1, reference_side=16 * 10)
    assert cache_bytes(variant, RECIPES["bf16"], shape) == stored // 2  # 100 tokens, not 200
    assert weights("transformer_cached", variant) == weights("transformer", variant)
    unused = ("context_embedder", "norm_out", "proj_out", "double_stream_modulation_txt", "add_", "ff_context")
    last = "single_transformer_blocks.2.attn.to_out"
    needed = sum(
        parameter.numel()
        for name, parameter in extract.model.named_parameters()
        if not any(word in name for word in unused) and "norm_added" not in name and not name.startswith(last)
    )
    assert weights("transformer_extract", variant).total == pytest.approx(needed, rel=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "mistral3"])
def test_the_text_encoders_formula_counts_what_torch_counts(kind: Any) -> None:
    sizes = TextEncoder(kind, 256, 5, 4, 2, 64, 768, 1000, 1e6, 1e-6, taps=(1, 3, 5), padding_side="right")
    common = {
        "hidden_size": 256,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "vocab_size": 1000,
        "attn_implementation": "sdpa",
    }
    with torch.device("meta"):
        model: torch.nn.Module = (
            Qwen3Model(Qwen3Config(**common)) if kind == "qwen3" else MistralModel(MistralConfig(**common))
        )
        mask = torch.zeros(1, 1, TEXT, TEXT)  # building a causal mask fails on meta
        ids = torch.zeros(1, TEXT, dtype=torch.long)
        measured = counted(model, input_ids=ids, attention_mask=mask, use_cache=False)
    assert flops.text_encoder(sizes, TEXT).total == pytest.approx(measured, rel=1e-3)
    final_norm = 256  # left out of the export
    counted_weights = weights("text_encoder", replace(VARIANTS["dev"], text_encoder=sizes))
    assert counted_weights.total == parameters(model) - final_norm


@pytest.mark.parametrize("decoder", [(128, 256, 512, 512), (96, 192, 384, 384)])
def test_the_vaes_formula_counts_what_torch_counts(decoder: tuple[int, ...]) -> None:
    sizes = Vae(decoder_channels=decoder)
    with torch.device("meta"):
        vae = AutoencoderKLFlux2(decoder_block_out_channels=decoder)
        decode = counted(_Call(vae.decode), torch.zeros(1, 32, 16, 32))
        encode = counted(_Call(vae.encode), torch.zeros(1, 3, 128, 256))
    assert flops.vae_decoder(sizes, 256, 128).total == pytest.approx(decode, rel=2e-3)
    assert flops.vae_encoder(sizes, 256, 128).total == pytest.approx(encode, rel=2e-3)


class _Call(torch.nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, tensor: torch.Tensor) -> Any:
        return self.function(tensor)


@pytest.mark.parametrize(
    ("name", "transformer", "text_encoder_billions"),
    [("dev", 32_223_281_152, 17.34), ("klein-4b", 3_875_544_576, 3.11), ("klein-9b", 9_078_581_248, 5.83)],
)
def test_weights_of_the_published_variants(name: str, transformer: int, text_encoder_billions: float) -> None:
    variant = VARIANTS[name]
    assert weights("transformer", variant).total == transformer
    assert weights("text_encoder", variant).total / 1e9 == pytest.approx(text_encoder_billions, abs=0.01)
    assert weights("vae_decoder", variant).total / 1e6 == pytest.approx(49.6, abs=0.1)
    assert weights("vae_encoder", variant).total / 1e6 == pytest.approx(34.4, abs=0.1)


@pytest.mark.parametrize(
    ("name", "width", "teraflops"),
    [("klein-4b", 1024, 34.82), ("klein-9b", 1024, 75.51), ("dev", 1024, 282.60), ("dev", 512, 87.77)],
)
def test_one_step_of_the_published_variants(name: str, width: int, teraflops: float) -> None:
    variant = VARIANTS[name]
    step = flops.transformer(variant.transformer, variant.tokens(width, width), 512).total
    assert step / 1e12 == pytest.approx(teraflops, abs=0.01)


def test_an_image_is_text_steps_and_decoding() -> None:
    assert flops.image(VARIANTS["klein-4b"], 1024, 1024, 4) / 1e12 == pytest.approx(152.7, abs=0.1)
    assert flops.image(VARIANTS["dev"], 1024, 1024, 50) / 1e12 == pytest.approx(14_158, rel=1e-3)
    assert flops.image(VARIANTS["klein-base-4b"], 1024, 1024, 50) / 1e12 == pytest.approx(3_498, rel=1e-3)


def test_the_bytes_of_the_sample_are_those_that_lie_on_the_disk() -> None:
    folder = resolve("sample")
    variant, bf16 = read_variant(folder), RECIPES["bf16"]
    stored = {
        part: sum(p.stat().st_size for p in (folder / part).glob("*.safetensors")) for part in ("transformer", "vae")
    }
    assert weights("transformer", variant).bytes(bf16) == pytest.approx(stored["transformer"], rel=0.01)
    both = sum(weights(part, variant).bytes(bf16) for part in ("vae_encoder", "vae_decoder"))
    assert both == pytest.approx(stored["vae"], rel=0.02)
