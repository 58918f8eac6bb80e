"""The two halves of the VAE written for export, including patching, batch norm and the conversion to bytes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2
from torch import Tensor, nn

from export.graphs.attention import Attention, attend
from export.graphs.axes import join_axes, split_axis
from kit.variants import Vae

CHUNKS = 4  # of queries; divides the number of positions, because a token is two by two of them


def attend_places(attn: Any, form: Attention, x: Tensor, temb: None = None) -> Tensor:
    """Attend with one head over all positions of a feature map [B, C, h, w]; replaces diffusers' Attention.forward.

    Always as matrix products in an ONNX graph: no TensorRT has a fused kernel for this head of 384 or 512 channels, so
    the Attention operator does not compile, and the scores are a tensor in memory. Queries therefore attend in chunks:
    at 2048x2048, the scores of all 65,536 positions at once take 17.6 GB of scratch memory, in four chunks 6.7 GB.
    """
    places = attn.group_norm(join_axes(x, 2, 3)).transpose(1, 2)  # [B, h * w, C]
    query, key, value = (project(places).unsqueeze(1) for project in (attn.to_q, attn.to_k, attn.to_v))
    query = query * query.shape[-1] ** -0.5
    if form == "sdpa":
        mixed = attend(form, query, key, value)  # [B, 1, h * w, C]
    else:
        chunks = split_axis(query, 2, CHUNKS, x.shape[2] * x.shape[3] // CHUNKS).unbind(2)  # each [B, 1, h * w / 4, C]
        mixed = torch.cat([attend("matmul", chunk, key, value) for chunk in chunks], dim=2)
    back: Tensor = attn.to_out[0](mixed.squeeze(1))  # [B, h * w, C]
    return x + back.transpose(1, 2).reshape(x.shape)


class Enlarge(nn.Module):
    """Double height and width and convolve; diffusers' own module branches on the batch size, which a graph cannot."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor, output_size: None = None) -> Tensor:
        larger: Tensor = self.conv(nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        return larger


def autoencoder(sizes: Vae, attention: Attention) -> AutoencoderKLFlux2:
    """Build the VAE from its sizes."""
    model = AutoencoderKLFlux2(
        block_out_channels=sizes.channels,
        decoder_block_out_channels=sizes.decoder_channels,
        layers_per_block=sizes.layers_per_block,
        latent_channels=sizes.latent_channels,
        norm_num_groups=sizes.norm_groups,
        batch_norm_eps=sizes.bn_eps,
    ).eval()
    for half in (model.encoder, model.decoder):
        for attn in half.mid_block.attentions:
            attn.forward = partial(attend_places, attn, attention)
    return model


class VaeEncoderGraph(nn.Module):
    """Map an image to the packed, normalized latents of its posterior mode."""

    def __init__(self, sizes: Vae, attention: Attention) -> None:
        super().__init__()
        self.model = autoencoder(sizes, attention)
        del self.model.decoder, self.model.post_quant_conv

    def forward(self, image: Tensor) -> Tensor:
        """Map images [B, 3, 16h, 16w] in [-1, 1] to latents [B, 128, h, w]."""
        moments: Tensor = self.model.quant_conv(self.model.encoder(image))  # [B, 64, 2h, 2w]
        mode, _ = moments.chunk(2, dim=1)
        batch, channels, height, width = mode.shape
        patches = mode.reshape(batch, channels, height // 2, 2, width // 2, 2)  # [B, 32, h, 2, w, 2]
        packed = join_axes(patches.permute(0, 1, 3, 5, 2, 4), 1, 3)  # [B, 128, h, w]
        mean, deviation = statistics(self.model)
        return (packed - mean) / deviation


class VaeDecoderGraph(nn.Module):
    """Map packed, normalized latents to image bytes."""

    def __init__(self, sizes: Vae, attention: Attention) -> None:
        super().__init__()
        self.model = autoencoder(sizes, attention)
        del self.model.encoder, self.model.quant_conv
        for block in self.model.decoder.up_blocks:
            if block.upsamplers is not None:
                block.upsamplers = nn.ModuleList(Enlarge(old.conv) for old in block.upsamplers)

    def forward(self, latents: Tensor) -> Tensor:
        """Map latents [B, 128, h, w] to images [B, 16h, 16w, 3] of bytes, with the rounding of diffusers."""
        mean, deviation = statistics(self.model)
        packed = split_axis(latents * deviation + mean, 1, latents.shape[1] // 4, 2, 2)  # [B, 32, 2, 2, h, w]
        mode = join_axes(join_axes(packed.permute(0, 1, 4, 2, 5, 3), 4, 5), 2, 3)  # [B, 32, 2h, 2w]
        image: Tensor = self.model.decoder(self.model.post_quant_conv(mode))  # [B, 3, 16h, 16w] in [-1, 1]
        unit = (image * 0.5 + 0.5).clamp(0, 1).to(torch.float32).permute(0, 2, 3, 1)
        return (unit * 255).round().to(torch.uint8)


def statistics(model: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the packed latents, each [1, 128, 1, 1]."""
    mean: Tensor = model.bn.running_mean.reshape(1, -1, 1, 1)
    variance: Tensor = model.bn.running_var.reshape(1, -1, 1, 1)
    return mean, (variance + model.bn.eps).sqrt()
