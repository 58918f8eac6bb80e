"""Estimate the shared memory of a deployment: Triton passes tensors to its Python models through /dev/shm.

Docker gives a container 64 MB of it unless told otherwise. When it is full, requests fail or the models' processes end
with a bus error, which does not say why. The estimate counts the tensors of every Python model at the deployment's
limits; what the encoded images and the regions' own bookkeeping need is small beside them.
"""

from __future__ import annotations

from dataclasses import dataclass

from kit.dtypes import Compute, number_format
from kit.image_size import MAX_PIXELS
from kit.variants import Variant
from planner.memory import gigabytes

MODEL_BYTES = 1_000_000  # the region that Triton creates for each Python model
CURE = "docker run --shm-size=2g, or in Kubernetes an emptyDir of medium Memory at /dev/shm"


@dataclass(frozen=True)
class Traffic:
    """The largest requests of a deployment and how many share a call; the defaults of `serve repository`."""

    text_batch: int = 8
    vae_batch: int = 4
    max_images: int = 4
    max_pixels: int = MAX_PIXELS


def shared_bytes(
    variant: Variant, compute: Compute, traffic: Traffic, python_text: bool = True, python_vae: bool = True
) -> int:
    """Return an upper estimate; text encoder and VAE decoder count only where Python models run them."""
    item = number_format(compute).bits // 8
    passes = 2 if variant.guidance == "cfg" else 1
    embeds = variant.text_tokens * variant.transformer.joint_dim * item
    ids = 2 * variant.text_tokens * 8
    latents = traffic.max_pixels // variant.pixels_per_token**2 * variant.transformer.channels * item
    pixels = traffic.max_pixels * 3
    tokenizer = passes * ids
    text_encoder = traffic.text_batch * (ids + embeds) if python_text else 0
    denoiser = passes * embeds + traffic.max_images * latents  # of one request: it keeps its own copy
    front = 2 * traffic.max_images * (latents + pixels)  # one arrives from the denoiser while one leaves as an image
    vae_decoder = max(traffic.vae_batch, traffic.max_images) * (latents + pixels) if python_vae else 0
    image_encoder = 2 * traffic.max_images * pixels
    return 7 * MODEL_BYTES + tokenizer + text_encoder + denoiser + front + vae_decoder + image_encoder


def problem(free: int | None, needed: int) -> str | None:
    """Return why the free shared memory is too small and what to do; None if it is enough or not known."""
    if free is None or free >= needed:
        return None
    return f"/dev/shm has {gigabytes(free)} free, requests at the limits need up to {gigabytes(needed)}: {CURE}"
