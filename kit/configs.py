"""Read a variant from the configs of a checkpoint in diffusers layout, regardless of folder names.

A value means here what it means to diffusers and transformers. What these ignore is ignored, and said: the length of
texts (diffusers pads to 512 tokens) and the size of images (1024 pixels) can be changed by the kit's own settings only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from kit.errors import CheckpointError
from kit.json_object import JsonObject, read_object, shown
from kit.own_settings import OwnSettings, read_own_settings
from kit.variants import (
    FAMILY_DEFAULTS,
    MAX_TEXT_TOKENS,
    VARIANTS,
    Family,
    TextEncoder,
    Transformer,
    Vae,
    Variant,
)

logger = logging.getLogger(__name__)
TRAIN_TIMESTEPS = 1000

# Values of scheduler_config.json that the formulas of `pipeline.schedule` require.
SCHEDULER_CONFIG: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_REQUIRED = ("_class_name", "num_train_timesteps", "use_dynamic_shifting")  # the others may be omitted


def check_scheduler(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError for a scheduler config with a schedule that `pipeline.schedule` does not compute."""
    for key, expected in SCHEDULER_CONFIG.items():
        # diffusers writes False for unset beta/karras switches in some versions and null in others
        found = config.get(key, None if key in _REQUIRED else expected)
        if found != expected and (found or expected):
            raise CheckpointError(f"{where}: {key} is {shown(found)}; FLUX.2 schedules have {expected!r}")


def read_variant(checkpoint: Path) -> Variant:
    """Read the variant of a checkpoint; published variants are recognized by their sizes.

    Raises CheckpointError, naming the file and the key, for a config that is missing, unreadable or not of FLUX.2.
    """
    family = _family(read_object(checkpoint / "model_index.json"))
    transformer = _transformer(read_object(checkpoint / "transformer" / "config.json"))
    text_encoder = _text_encoder(read_object(checkpoint / "text_encoder" / "config.json"), family)
    if transformer.joint_dim != 3 * text_encoder.hidden:
        raise CheckpointError(
            f"{checkpoint}: transformer joint_attention_dim {transformer.joint_dim} is not 3 x the text encoder's "
            f"hidden size {text_encoder.hidden}; the two parts belong to different variants"
        )
    known = next(
        (
            v
            for v in VARIANTS.values()
            if (v.family, v.transformer, v.text_encoder) == (family, transformer, text_encoder)
        ),
        None,
    )
    base = known or replace(FAMILY_DEFAULTS[family], name=f"{family}-custom", licence="see the checkpoint")
    scheduler = checkpoint / "scheduler" / "scheduler_config.json"
    check_scheduler(read_object(scheduler).values, str(scheduler))
    vae_config = read_object(checkpoint / "vae" / "config.json")
    own = read_own_settings(checkpoint)
    _say_ignored(own, checkpoint / "tokenizer" / "tokenizer_config.json", vae_config)
    return replace(
        base,
        transformer=transformer,
        text_encoder=text_encoder,
        vae=_vae(vae_config),
        text_tokens=own.text_tokens,
        image_size=own.image_size,
    )


def _say_ignored(own: OwnSettings, tokenizer: Path, vae: JsonObject) -> None:
    """Log the values that look as if they changed the text or the image, and that diffusers ignores."""
    if tokenizer.is_file():  # an export without the text encoder needs none
        longest = read_object(tokenizer).number("model_max_length", own.text_tokens)
        if longest < own.text_tokens:
            _log_once(f"{tokenizer}: model_max_length {longest:g} is ignored; texts have {own.text_tokens} tokens")
    size = vae.integer("sample_size", own.image_size)
    if size != own.image_size:
        _log_once(f"{vae.where}: sample_size {size} is ignored; images have {own.image_size} pixels a side by default")


@cache
def _log_once(message: str) -> None:
    logger.warning("%s", message)


def _family(index: JsonObject) -> Family:
    match index.get("_class_name"):
        case "Flux2Pipeline":
            return "dev"
        case "Flux2KleinKVPipeline":
            return "klein-kv"
        case "Flux2KleinPipeline":
            return "klein" if index.flag("is_distilled", False) else "klein-base"
        case other:
            raise CheckpointError(
                f"{index.where}: _class_name {shown(other)} is not a FLUX.2 pipeline; there are: "
                "Flux2Pipeline, Flux2KleinPipeline, Flux2KleinKVPipeline"
            )


def _check(config: JsonObject, settings: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise CheckpointError for a setting whose value changes the computation and that the graphs do not have."""
    for key, allowed in settings.items():
        if config.values.get(key, allowed[0]) not in allowed:
            raise CheckpointError(
                f"{config.where}: {key} is {shown(config.values[key])}; the graph is written for {allowed[0]!r}"
            )


_LAYERS = 512  # more than any model of the family has
_WIDTH = 2**18


def _transformer(config: JsonObject) -> Transformer:
    if config.get("_class_name") != "Flux2Transformer2DModel":
        raise CheckpointError(
            f"{config.where}: _class_name {shown(config.get('_class_name'))} is not Flux2Transformer2DModel"
        )
    channels = config.integer("in_channels", 128, most=_WIDTH)
    _check(config, {"patch_size": (1, None), "out_channels": (None, channels)})
    head_dim = config.integer("attention_head_dim", most=_WIDTH)
    axes = config.integers("axes_dims_rope", (32, 32, 32, 32), most=_WIDTH)
    if len(axes) != 4 or sum(axes) != head_dim or any(axis % 2 for axis in axes):
        raise CheckpointError(
            f"{config.where}: axes_dims_rope is {list(axes)[:8]}; expected four even numbers with the sum "
            f"{head_dim} (attention_head_dim)"
        )
    return Transformer(
        double_blocks=config.integer("num_layers", most=_LAYERS),
        single_blocks=config.integer("num_single_layers", most=_LAYERS),
        heads=config.integer("num_attention_heads", most=_LAYERS),
        head_dim=head_dim,
        joint_dim=config.integer("joint_attention_dim", most=_WIDTH),
        guidance_embeds=config.flag("guidance_embeds", True),
        channels=channels,
        mlp_ratio=config.positive("mlp_ratio", 3.0),
        rope_axes=axes,
        rope_theta=config.integer("rope_theta", 2000),
        time_channels=config.integer("timestep_guidance_channels", 256, least=2, most=_WIDTH),
        eps=config.positive("eps", 1e-6),
    )


# Values of a text encoder's config, other than sizes, that the graph supports.
_TEXT_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
}


def _text_encoder(outer: JsonObject, family: Family) -> TextEncoder:
    defaults = FAMILY_DEFAULTS[family].text_encoder
    config = (outer.object("text_config") if family == "dev" else None) or outer
    _check(config, _TEXT_SETTINGS)
    if outer.get("model_type") not in (None, defaults.kind):
        raise CheckpointError(
            f"{outer.where}: model_type is {shown(outer.get('model_type'))}; {family} has a text encoder of type "
            f"{defaults.kind!r}"
        )
    window = config.number("sliding_window", MAX_TEXT_TOKENS)
    if defaults.kind == "mistral3" and window < MAX_TEXT_TOKENS:
        raise config.wrong("sliding_window", f"null or at least {MAX_TEXT_TOKENS}; the graph attends to the whole text")
    rope = config.object("rope_parameters") or config.object("rope_scaling") or JsonObject(config.where, {})
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{config.where}: rope_type {kind!r} is not supported")
    _check(rope, {"partial_rotary_factor": (1.0, None)})
    heads = config.integer("num_attention_heads", most=_LAYERS)
    hidden = config.integer("hidden_size", most=_WIDTH)
    found = TextEncoder(
        kind=defaults.kind,
        hidden=hidden,
        layers=config.integer("num_hidden_layers", most=_LAYERS),
        heads=heads,
        kv_heads=config.integer("num_key_value_heads", heads, most=_LAYERS),
        head_dim=config.integer("head_dim", max(1, hidden // heads), most=_WIDTH),
        ffn=config.integer("intermediate_size", most=_WIDTH),
        vocab=config.integer("vocab_size"),
        rope_theta=rope.positive("rope_theta", config.positive("rope_theta", defaults.rope_theta)),
        eps=config.positive("rms_norm_eps", defaults.eps),
        taps=defaults.taps,
        padding_side=defaults.padding_side,
    )
    if found.heads % found.kv_heads or found.head_dim % 2:
        raise CheckpointError(
            f"{config.where}: {found.heads} heads of {found.head_dim} values cannot share {found.kv_heads} key heads; "
            "check num_attention_heads, num_key_value_heads and head_dim"
        )
    if found.layers < max(found.taps):
        raise CheckpointError(
            f"{config.where}: num_hidden_layers is {found.layers}; FLUX.2 reads the output of layer {max(found.taps)}"
        )
    return found


# Values of a VAE's config, other than sizes, that the graph supports.
_VAE_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "act_fn": ("silu", None),
    "use_quant_conv": (True, None),
    "use_post_quant_conv": (True, None),
    "mid_block_add_attention": (True, None),
    "patch_size": ([2, 2], None),
    "in_channels": (3, None),
    "out_channels": (3, None),
    "down_block_types": (["DownEncoderBlock2D"] * 4, None),
    "up_block_types": (["UpDecoderBlock2D"] * 4, None),
}


def _vae(config: JsonObject) -> Vae:
    if config.get("_class_name") != "AutoencoderKLFlux2":
        raise CheckpointError(
            f"{config.where}: _class_name {shown(config.get('_class_name'))} is not AutoencoderKLFlux2"
        )
    _check(config, _VAE_SETTINGS)
    channels = config.integers("block_out_channels", Vae.channels, most=_WIDTH)
    decoder = config.integers("decoder_block_out_channels", channels, most=_WIDTH)
    groups = config.integer("norm_num_groups", 32, most=_WIDTH)
    for key, widths in (("block_out_channels", channels), ("decoder_block_out_channels", decoder)):
        if len(widths) != 4 or any(width % groups for width in widths):
            raise CheckpointError(
                f"{config.where}: {key} is {list(widths)[:8]}; expected four multiples of {groups} (norm_num_groups)"
            )
    return Vae(
        channels=channels,
        decoder_channels=decoder,
        layers_per_block=config.integer("layers_per_block", 2, most=_LAYERS),
        latent_channels=config.integer("latent_channels", 32, most=_WIDTH),
        norm_groups=groups,
        bn_eps=config.positive("batch_norm_eps", 1e-4),
    )
