"""List the convolutions of AutoencoderKLFlux2 as data: input and output channels, kernel size and downsampling."""

from __future__ import annotations

from itertools import pairwise

from kit.variants import Vae

Layers = tuple[tuple[int, int, int, int], ...]  # (in, out, kernel, pixels per output point and side)


def decoder_layers(vae: Vae) -> Layers:
    """List the convolutions from latents to pixels, including the 1x1 convolution after the latents."""
    latent, channels = vae.latent_channels, tuple(reversed(vae.decoder_channels))
    scale = 2 ** (len(channels) - 1)
    layers = [(latent, latent, 1, scale), (latent, channels[0], 3, scale), *_middle(channels[0], scale)]
    for level, (inward, outward) in enumerate(pairwise((channels[0], *channels))):
        layers += _residuals(inward, outward, vae.layers_per_block + 1, scale)
        if level < len(channels) - 1:
            scale //= 2
            layers.append((outward, outward, 3, scale))
    return (*layers, (channels[-1], 3, 3, 1))


def encoder_layers(vae: Vae) -> Layers:
    """List the convolutions from pixels to the moments of the latents, including the final 1x1 convolution."""
    channels, scale = vae.channels, 1
    layers = [(3, channels[0], 3, scale)]
    for level, (inward, outward) in enumerate(pairwise((channels[0], *channels))):
        layers += _residuals(inward, outward, vae.layers_per_block, scale)
        if level < len(channels) - 1:
            scale *= 2
            layers.append((outward, outward, 3, scale))
    moments = 2 * vae.latent_channels
    return (*layers, *_middle(channels[-1], scale), (channels[-1], moments, 3, scale), (moments, moments, 1, scale))


def _residuals(inward: int, outward: int, count: int, scale: int) -> Layers:
    first = [(inward, outward, 3, scale), (outward, outward, 3, scale)]
    shortcut = [(inward, outward, 1, scale)] if inward != outward else []
    return (*first, *shortcut, *([(outward, outward, 3, scale)] * 2 * (count - 1)))


def _middle(channels: int, scale: int) -> Layers:
    """List the convolutions of the two residual blocks around the attention, which has none."""
    return ((channels, channels, 3, scale),) * 4
