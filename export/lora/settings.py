"""Read the strength that an adapter was trained with, where it is stored outside of the tensors.

diffusers writes peft's settings into the header of the file (`lora_adapter_metadata`), peft into adapter_config.json in
the same folder, other trainers write single words into the header. Files without any of these and without alpha tensors
are meant to be applied at scale 1.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.lora.allowed import check_allowed
from export.lora.names import LoraPart
from kit.errors import UsageError
from kit.json_object import JsonObject, is_number, parse_object, read_object, shown
from kit.safetensors_file import read_metadata

logger = logging.getLogger(__name__)
HEADER_KEY = "lora_adapter_metadata"
PEFT_CONFIG = "adapter_config.json"
_ALPHA_WORDS = ("lora_alpha", "network_alpha", "alpha")
_RANK_WORDS = ("r", "rank", "lora_rank", "network_dim", "lora_r")
_BAKED_WORD = "ss_network_alpha"  # kohya's, who stores alpha as tensors; converters multiply it in and keep the word
_PREFIX = re.compile(r"(base_model\.model\.)?(transformer|unet|text_encoder)\.")
_MOST_REPEATS = 4


@dataclass(frozen=True)
class LoraSettings:
    """Alpha and rank according to a header or config; patterns are regular expressions for the ends of module names."""

    origin: str  # its source, for messages
    alpha: float | None = None
    rank: int | None = None
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    by_root: bool = False  # rank-stabilized: alpha / sqrt(rank)


Settings = Mapping[LoraPart, LoraSettings]


def config_beside(file: Path) -> Path | None:
    """Return peft's config next to an adapter file, whatever the file's name, or None if there is none."""
    config = file.parent / PEFT_CONFIG
    return config if config.is_file() else None


def read_settings(file: Path) -> Settings:
    """Read the settings of an adapter file for each part; a part without settings is left out.

    Raises UsageError if they are invalid or require something that cannot be merged.
    """
    metadata = read_metadata(file)
    key, config = _settings_key(metadata), config_beside(file)
    if key is not None:
        raw = parse_object(metadata[key], f"{file}: {key}", UsageError)
        if config is not None:
            logger.warning("%s: the settings in the header are applied, and not %s beside it", file, config.name)
    elif config is not None:
        raw = read_object(config, UsageError)
    else:
        return _from_words(file, metadata)
    parts: dict[LoraPart, dict[str, Any]] = {}
    for key, value in raw.values.items():
        prefix = _PREFIX.match(key)
        part: LoraPart = "text_encoder" if prefix and prefix[2] == "text_encoder" else "transformer"
        bare = key[prefix.end() :] if prefix else key
        values = parts.setdefault(part, {})
        if bare in values and values[bare] != value:
            raise UsageError(f"{raw.where}: {bare!r} is given twice, as {shown(values[bare])} and {shown(value)}")
        values[bare] = value
    return {part: _settings(JsonObject(raw.where, values, UsageError)) for part, values in parts.items()}


def _settings_key(metadata: Mapping[str, str]) -> str | None:
    """Return the key of the header that holds peft's settings: diffusers' own, or one whose value looks like them."""
    if HEADER_KEY in metadata:
        return HEADER_KEY
    for key, text in metadata.items():
        value = _plain(text) if text.lstrip().startswith("{") else None
        if isinstance(value, dict) and {"lora_alpha", "peft_type"} & {_PREFIX.sub("", name) for name in value}:
            return key
    return None


def _settings(raw: JsonObject) -> LoraSettings:
    kind = raw.get("peft_type") or "LORA"
    if kind != "LORA":
        raise UsageError(f"{raw.where}: peft_type {shown(kind)} cannot be merged; only LORA is supported")
    for key in ("use_dora", "fan_in_fan_out", "lora_bias"):
        if raw.get(key):
            raise UsageError(f"{raw.where}: {key} is set, which cannot be merged")
    check_allowed(raw)
    alphas = _pattern(raw, "alpha_pattern", "alpha")
    if raw.get("lora_alpha") is None:
        if alphas:
            raise UsageError(f"{raw.where}: has alpha_pattern but no lora_alpha")
        logger.warning("%s has no lora_alpha: the adapter is applied at scale 1, as if alpha were its rank", raw.where)
    ranks = _pattern(raw, "rank_pattern", "rank")
    if wrong := next((key for key, value in ranks.items() if value != int(value) or value < 1), None):
        raise UsageError(f"{raw.where}: rank of {wrong!r} is {ranks[wrong]:g}, not a positive whole number")
    return LoraSettings(
        origin=raw.where,
        alpha=None if raw.get("lora_alpha") is None else _number(raw.where, "lora_alpha", raw.get("lora_alpha")),
        rank=None if raw.get("r") is None else raw.integer("r"),
        alpha_pattern=alphas,
        rank_pattern={key: int(value) for key, value in ranks.items()},
        by_root=raw.flag("use_rslora", False),
    )


def _pattern(raw: JsonObject, key: str, what: str) -> dict[str, float]:
    pattern = raw.get(key) or {}
    if not isinstance(pattern, dict):
        raise UsageError(f"{raw.where}: {key} is not a JSON object")
    for name in pattern:
        try:
            re.compile(name)
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(f"{raw.where}: {key} {name!r} is not a regular expression ({error})") from None
        if re.search(r"\)[*+{]", name) or len(re.findall(r"(?<!\\)[*+{]", name)) > _MOST_REPEATS:
            raise UsageError(
                f"{raw.where}: {key} {name!r} repeats too much to be matched in bounded time; write the names out"
            )
    return {name: _number(raw.where, f"{what} of {name!r}", value) for name, value in pattern.items()}


def _from_words(file: Path, metadata: Mapping[str, str]) -> Settings:
    """Read alpha from single words of the header, and say which convention is followed."""
    if unknown := next((key for key in metadata if key in ("use_dora", "use_rslora") and _set(metadata[key])), None):
        raise UsageError(
            f"{file}: the header says {unknown} {metadata[unknown]!r}, whose scale the kit does not know; save the "
            "adapter with peft or diffusers"
        )
    if start := metadata.get("init_lora_weights"):
        check_allowed(JsonObject(f"{file}: header", {"init_lora_weights": _plain(start)}, UsageError))
    word = next((word for word in _ALPHA_WORDS if word in metadata), None)
    if word is None:
        if _BAKED_WORD in metadata:
            logger.warning(
                "%s: the header's %s is not applied: the trainer that writes it stores alpha as tensors; without them "
                "the scale is 1",
                file,
                _BAKED_WORD,
            )
        return {}
    alpha = _number(f"{file}: header", word, _plain(metadata[word]))
    rank_word = next((word for word in _RANK_WORDS if word in metadata), None)
    rank = None
    if rank_word is not None:
        value = _number(f"{file}: header", rank_word, _plain(metadata[rank_word]))
        if value != int(value) or value < 1:
            raise UsageError(f"{file}: header: {rank_word} is {value:g}, not a positive whole number")
        rank = int(value)
    logger.warning(
        "%s: alpha %g is taken from the header's %s; modules without an alpha tensor are applied at alpha / rank",
        file,
        alpha,
        word,
    )
    return {"transformer": LoraSettings(f"{file}: header", alpha, rank)}


def _set(text: str) -> bool:
    return text.strip().lower() not in ("", "false", "0", "none", "null")


def _plain(text: str) -> object:
    """Return the value of a word of the header, which is text for every type."""
    try:
        return json.loads(text.strip().lower())
    except (ValueError, RecursionError):
        return text


def _number(origin: str, what: str, value: object) -> float:
    if not is_number(value):
        raise UsageError(f"{origin}: {what} is {shown(value)}, not a finite number")
    assert isinstance(value, int | float)
    return float(value)
