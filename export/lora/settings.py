"""Read the strength that a peft adapter was trained with, which diffusers and peft store outside of the tensors.

diffusers writes it into the header of the file, peft into adapter_config.json in the same folder. Files without
either, and without alpha tensors, are meant to be applied at scale 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import UsageError
from kit.safetensors_file import read_metadata

HEADER_KEY = "lora_adapter_metadata"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class LoraSettings:
    """Alpha according to a header or config; patterns are regular expressions for the ends of module names."""

    origin: str  # its source, for messages
    alpha: float
    alpha_pattern: Mapping[str, float]
    by_root: bool = False  # rank-stabilized: alpha / sqrt(rank)

    def scale(self, module: str, rank: int) -> float:
        """Return alpha / rank of one module; the first matching pattern wins, as in peft."""
        alpha = next(
            (value for key, value in self.alpha_pattern.items() if re.fullmatch(rf"(.*\.)?({key})", module)), self.alpha
        )
        return alpha / (math.sqrt(rank) if self.by_root else rank)


def config_beside(file: Path) -> Path | None:
    """Return peft's config next to an adapter file, or None if there is none."""
    config = file.parent / PEFT_CONFIG
    return config if file.name == PEFT_FILE and config.is_file() else None


def read_settings(file: Path) -> LoraSettings | None:
    """Read the settings of an adapter file; None if there are none.

    Raises UsageError if they are invalid or require something that cannot be merged.
    """
    header = read_metadata(file).get(HEADER_KEY)
    config = config_beside(file)
    if header is not None:
        origin, text = f"{file}: {HEADER_KEY}", header
    elif config is not None:
        origin, text = str(config), config.read_text(errors="replace")
    else:
        return None
    try:
        raw = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{origin} is not valid JSON ({error})") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{origin} is not a JSON object")
    return _settings(origin, {key.removeprefix("transformer."): value for key, value in raw.items()})


def _settings(origin: str, raw: Mapping[str, Any]) -> LoraSettings | None:
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        raise UsageError(f"{origin}: peft_type {kind!r} cannot be merged; only LORA is supported")
    for key in ("use_dora", "fan_in_fan_out", "lora_bias"):
        if raw.get(key):
            raise UsageError(f"{origin}: {key} is set, which cannot be merged")
    if "lora_alpha" not in raw:
        if raw.get("alpha_pattern"):
            raise UsageError(f"{origin}: has alpha_pattern but no lora_alpha")
        return None
    pattern = raw.get("alpha_pattern") or {}
    if not isinstance(pattern, dict):
        raise UsageError(f"{origin}: alpha_pattern is not a JSON object")
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise UsageError(f"{origin}: alpha_pattern {key!r} is not a regular expression ({error})") from None
    return LoraSettings(
        origin=origin,
        alpha=_number(origin, "lora_alpha", raw["lora_alpha"]),
        alpha_pattern={key: _number(origin, f"alpha of {key!r}", value) for key, value in pattern.items()},
        by_root=bool(raw.get("use_rslora")),
    )


def _number(origin: str, what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UsageError(f"{origin}: {what} is {value!r}, not a finite number")
    return float(value)
