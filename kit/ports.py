"""Define the inputs and outputs of every exported part, from which axes, profiles and server configs are derived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from kit.dtypes import Compute, Dtype
from kit.variants import Transformer, Variant

PartName = Literal[
    "text_encoder", "transformer", "transformer_extract", "transformer_cached", "vae_encoder", "vae_decoder"
]
PARTS: tuple[PartName, ...] = ("text_encoder", "transformer", "vae_encoder", "vae_decoder")  # of every variant
ServedPart = Literal["text_encoder", "transformer", "vae_decoder"]
SERVED_PARTS: tuple[ServedPart, ...] = get_args(ServedPart)  # that a request runs through, in order
QUANTIZED_PARTS: tuple[PartName, ...] = ("text_encoder", "transformer")  # that recipes and calibration cover
KV_PARTS: tuple[PartName, ...] = ("transformer_extract", "transformer_cached")  # additional parts of klein-kv
ALL_PARTS: tuple[PartName, ...] = get_args(PartName)  # in pipeline order


@dataclass(frozen=True)
class Port:
    """One input or output of an exported graph."""

    name: str
    dtype: Dtype
    dims: tuple[str | int, ...]  # a string is a dynamic axis, "16*word" a multiple of one, a number is fixed

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Substitute sizes for the named axes."""
        return tuple(_size(d, sizes) if isinstance(d, str) else d for d in self.dims)


@dataclass(frozen=True)
class Ports:
    """All inputs and outputs of one part, in the order of the graph."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def parts_of(variant: Variant) -> tuple[PartName, ...]:
    """Return the parts of a variant in pipeline order."""
    return tuple(part for part in ALL_PARTS if part in PARTS or variant.family == "klein-kv")


def split_axis(axis: str) -> tuple[int, str]:
    """Split "16*width" into (16, "width") and "width" into (1, "width")."""
    factor, star, name = axis.rpartition("*")
    return (int(factor), name) if star else (1, axis)


def _size(axis: str, sizes: Mapping[str, int]) -> int:
    factor, name = split_axis(axis)
    if name not in sizes:
        raise KeyError(f"no size given for axis {name!r}; given: {', '.join(sizes)}")
    return factor * sizes[name]


def ports(part: PartName, variant: Variant, compute: Compute) -> Ports:
    """Return the ports of a part.

    Activations have the compute type. Timestep and guidance are always fp32 (the graph rounds them to the compute type
    where diffusers does), ids are int64 and output images are uint8 [B, H, W, 3]. The outputs of `transformer_extract`,
    rotated keys and values of the reference tokens by block, are inputs of `transformer_cached` under the same names at
    every step.
    """
    text = variant.text_tokens
    dim = variant.transformer.joint_dim
    channels = variant.transformer.channels
    latents: tuple[str | int, ...] = ("batch", channels, "latent_height", "latent_width")
    tokens: tuple[str | int, ...] = ("batch", "image_tokens", channels)
    match part:
        case "text_encoder":
            return Ports(
                inputs=(Port("input_ids", "i64", ("batch", text)), Port("attention_mask", "i64", ("batch", text))),
                outputs=(Port("prompt_embeds", compute, ("batch", text, dim)),),
            )
        case "transformer" | "transformer_cached":
            guidance = (Port("guidance", "fp32", ("batch",)),) if variant.transformer.guidance_embeds else ()
            return Ports(
                inputs=(
                    Port("hidden_states", compute, tokens),
                    Port("encoder_hidden_states", compute, ("batch", text, dim)),
                    Port("timestep", "fp32", ("batch",)),
                    *guidance,
                    Port("img_ids", "i64", ("batch", "image_tokens", 4)),
                    Port("txt_ids", "i64", ("batch", text, 4)),
                    *(_cache(variant.transformer, compute) if part == "transformer_cached" else ()),
                ),
                outputs=(Port("velocity", compute, tokens),),
            )
        case "transformer_extract":
            return Ports(
                inputs=(
                    Port("ref_hidden_states", compute, ("batch", "ref_tokens", channels)),
                    Port("ref_ids", "i64", ("batch", "ref_tokens", 4)),
                ),
                outputs=_cache(variant.transformer, compute),
            )
        case "vae_encoder":
            return Ports(
                inputs=(Port("image", compute, ("batch", 3, "16*latent_height", "16*latent_width")),),
                outputs=(Port("latents", compute, latents),),
            )
        case "vae_decoder":
            return Ports(
                inputs=(Port("latents", compute, latents),),
                outputs=(Port("image", "u8", ("batch", "16*latent_height", "16*latent_width", 3)),),
            )


def _cache(sizes: Transformer, compute: Compute) -> tuple[Port, ...]:
    """Return the ports of all keys and values, double blocks before single blocks."""
    dims = ("batch", sizes.heads, "ref_tokens", sizes.head_dim)
    blocks = range(sizes.double_blocks + sizes.single_blocks)
    return tuple(Port(f"ref_{kind}_{i}", compute, dims) for i in blocks for kind in ("key", "value"))
