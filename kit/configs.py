"""Read a variant from the configs of a checkpoint in diffusers layout, regardless of folder names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kit.errors import CheckpointError
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
            raise CheckpointError(f"{where}: {key} is {found!r}; FLUX.2 schedules have {expected!r}")


def read_variant(checkpoint: Path) -> Variant:
    """Read the variant of a checkpoint; published variants are recognized by their sizes.

    Raises CheckpointError, naming the file, for a config that is missing, unreadable or not of FLUX.2.
    """
    index = _config(checkpoint / "model_index.json")
    family = _family(index, checkpoint)
    transformer = _transformer(checkpoint / "transformer" / "config.json")
    text_encoder = _text_encoder(checkpoint, family)
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
    check_scheduler(_config(scheduler), str(scheduler))
    tokens = _text_tokens(checkpoint / "tokenizer" / "tokenizer_config.json")
    vae, image_size = _vae(checkpoint / "vae" / "config.json")
    return replace(
        base,
        transformer=transformer,
        text_encoder=text_encoder,
        vae=vae,
        text_tokens=tokens,
        image_size=image_size,
    )


def _config(path: Path) -> dict[str, Any]:
    """Read one JSON config of a checkpoint."""
    try:
        loaded = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing; a checkpoint in diffusers layout has this file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(loaded).__name__}")
    return loaded


def _family(index: Mapping[str, Any], checkpoint: Path) -> Family:
    match index.get("_class_name"):
        case "Flux2Pipeline":
            return "dev"
        case "Flux2KleinKVPipeline":
            return "klein-kv"
        case "Flux2KleinPipeline":
            return "klein" if index.get("is_distilled", False) else "klein-base"
        case other:
            raise CheckpointError(
                f"{checkpoint / 'model_index.json'}: _class_name {other!r} is not a FLUX.2 pipeline; there are: "
                "Flux2Pipeline, Flux2KleinPipeline, Flux2KleinKVPipeline"
            )


def _take(config: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in config:
        raise CheckpointError(f"{path}: key {key!r} is missing")
    return config[key]


def _transformer(path: Path) -> Transformer:
    config = _config(path)
    if config.get("_class_name") != "Flux2Transformer2DModel":
        raise CheckpointError(f"{path}: _class_name {config.get('_class_name')!r} is not Flux2Transformer2DModel")
    return Transformer(
        double_blocks=_take(config, "num_layers", path),
        single_blocks=_take(config, "num_single_layers", path),
        heads=_take(config, "num_attention_heads", path),
        head_dim=_take(config, "attention_head_dim", path),
        joint_dim=_take(config, "joint_attention_dim", path),
        guidance_embeds=config.get("guidance_embeds", True),
        channels=config.get("in_channels", 128),
        mlp_ratio=config.get("mlp_ratio", 3.0),
        rope_axes=tuple(config.get("axes_dims_rope", (32, 32, 32, 32))),
        rope_theta=config.get("rope_theta", 2000),
        time_channels=config.get("timestep_guidance_channels", 256),
        eps=config.get("eps", 1e-6),
    )


# Values of a text encoder's config, other than sizes, that the graph supports.
_TEXT_SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
}


def _text_encoder(checkpoint: Path, family: Family) -> TextEncoder:
    path = checkpoint / "text_encoder" / "config.json"
    outer = _config(path)
    defaults = FAMILY_DEFAULTS[family].text_encoder
    config = outer.get("text_config", outer) if family == "dev" else outer
    for key, allowed in _TEXT_SETTINGS.items():
        if config.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"{path}: {key} is {config[key]!r}; the graph is written for {allowed[0]!r}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise CheckpointError(f"{path}: rope_type {rope.get('rope_type', rope.get('type'))!r} is not supported")
    heads = _take(config, "num_attention_heads", path)
    hidden = _take(config, "hidden_size", path)
    return TextEncoder(
        kind=defaults.kind,
        hidden=hidden,
        layers=_take(config, "num_hidden_layers", path),
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        ffn=_take(config, "intermediate_size", path),
        vocab=_take(config, "vocab_size", path),
        rope_theta=float(rope.get("rope_theta", config.get("rope_theta", defaults.rope_theta))),
        eps=config.get("rms_norm_eps", defaults.eps),
        taps=defaults.taps,
        padding_side=defaults.padding_side,
    )


def _vae(path: Path) -> tuple[Vae, int]:
    config = _config(path)
    if config.get("_class_name") != "AutoencoderKLFlux2":
        raise CheckpointError(f"{path}: _class_name {config.get('_class_name')!r} is not AutoencoderKLFlux2")
    channels = tuple(config.get("block_out_channels", Vae.channels))
    return (
        Vae(
            channels=channels,
            decoder_channels=tuple(config.get("decoder_block_out_channels") or channels),
            layers_per_block=config.get("layers_per_block", 2),
            latent_channels=config.get("latent_channels", 32),
            norm_groups=config.get("norm_num_groups", 32),
            bn_eps=config.get("batch_norm_eps", 1e-4),
        ),
        int(config.get("sample_size", 1024)),
    )


def _text_tokens(path: Path) -> int:
    """Return the number of text tokens of the transformer: the family's 512, or fewer if the tokenizer says so."""
    longest = _config(path).get("model_max_length", MAX_TEXT_TOKENS)
    return int(min(MAX_TEXT_TOKENS, longest))
