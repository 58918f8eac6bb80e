"""Build the baselines: diffusers and transformers in eager bf16, with the same random weights as our modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.clock import Unavailable
from benchmarks.gpu.weights import fill, random_part
from kit.ports import PartName
from kit.variants import Variant


class TransformerBaseline(nn.Module):
    """diffusers' transformer with our inputs and outputs."""

    def __init__(self, variant: Variant, device: str) -> None:
        super().__init__()
        from diffusers import Flux2Transformer2DModel

        ours = random_part("transformer", variant, "bf16", device)
        self.model = on_meta(lambda: Flux2Transformer2DModel.from_config(ours.model.config))
        self.model.load_state_dict(ours.model.state_dict(), assign=True)
        self.model.eval()

    def forward(self, **inputs: Tensor) -> Tensor:
        velocity: Tensor = self.model(**inputs, return_dict=False)[0]
        return velocity


class TextBaseline(nn.Module):
    """transformers' language model as the pipeline calls it: all layers, including the head, and three taps."""

    def __init__(self, variant: Variant, device: str) -> None:
        super().__init__()
        self.taps = variant.text_encoder.taps
        self.model = language_model(variant, device)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen = self.model(input_ids, attention_mask=attention_mask, output_hidden_states=True, use_cache=False)
        return torch.cat([seen.hidden_states[tap] for tap in self.taps], dim=-1)


class VaeBaseline(nn.Module):
    """diffusers' decoder with the pipeline's steps around it."""

    def __init__(self, variant: Variant, device: str) -> None:
        super().__init__()
        self.vae = autoencoder(variant, device)

    def forward(self, latents: Tensor) -> Tensor:
        bn = self.vae.bn
        deviation = (bn.running_var + self.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
        packed = latents * deviation + bn.running_mean.view(1, -1, 1, 1)
        batch, channels, height, width = packed.shape
        patches = packed.reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        image = self.vae.decode(patches.reshape(batch, channels // 4, height * 2, width * 2), return_dict=False)[0]
        unit = (image * 0.5 + 0.5).clamp(0, 1).float().permute(0, 2, 3, 1)
        pixels: Tensor = (unit * 255).round().to(torch.uint8)
        return pixels


def baseline(part: PartName, variant: Variant, device: str) -> nn.Module:
    """Build the baseline of a part; raises Unavailable if diffusers is not installed."""
    need_diffusers()
    made = {"transformer": TransformerBaseline, "text_encoder": TextBaseline, "vae_decoder": VaeBaseline}[part]
    module: nn.Module = made(variant, device)
    return module


def need_diffusers() -> None:
    try:
        import diffusers  # noqa: F401
    except ImportError:
        raise Unavailable(
            "diffusers is not installed; it can be installed from a wheel, see the command's help"
        ) from None


def on_meta(build: Any) -> Any:
    """Call a constructor with bf16 parameters that take no memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            return build()
    finally:
        torch.set_default_dtype(before)


def autoencoder(variant: Variant, device: str) -> Any:
    """Build diffusers' VAE with the weights of our decoder and other weights for its encoder."""
    from diffusers import AutoencoderKLFlux2

    ours = random_part("vae_decoder", variant, "bf16", device)
    vae: Any = on_meta(lambda: AutoencoderKLFlux2.from_config(ours.model.config)).eval()
    for owner in vae.modules():
        if "num_batches_tracked" in owner._buffers:
            owner._buffers["num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    fill(vae, device, torch.bfloat16)
    unknown = vae.load_state_dict(ours.model.state_dict(), strict=False).unexpected_keys
    assert not unknown, unknown
    return vae


def language_model(variant: Variant, device: str) -> Any:
    """Build transformers' Qwen3 at full depth; the layers up to the last tap have the weights of our module."""
    sizes = variant.text_encoder
    if sizes.kind != "qwen3":
        raise Unavailable(f"no baseline for the text encoder of {variant.name}, a {sizes.kind}")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_theta},
        rms_norm_eps=sizes.eps,
        tie_word_embeddings=True,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = Qwen3ForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    ours = random_part("text_encoder", variant, "bf16", device)
    unknown = model.load_state_dict(ours.state_dict(), strict=False).unexpected_keys
    assert not unknown, unknown
    return model.requires_grad_(False)
