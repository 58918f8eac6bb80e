"""The settings of a LoRA that may stand in a file without changing the merged weight; everything else is refused.

A list of what is refused would let pass what a trainer adds next year. The settings are those of peft's LoraConfig.
"""

from __future__ import annotations

import re

from kit.errors import UsageError
from kit.json_object import JsonObject, shown

# How training chose, started or regularized the factors; the file holds the result.
_HARMLESS = re.compile(
    "task_type|base_model_name_or_path|revision|inference_mode|peft_version|auto_mapping|lora_dropout|target_modules|"
    "exclude_modules|layers_to_transform|layers_pattern|megatron_config|megatron_core|runtime_config|"
    "ephemeral_gpu_offload|qalora_group_size|eva_config|corda_config|lora_ga_config|loftq_config|ensure_weight_tying|"
    "_custom_modules"
)
_READ = re.compile("peft_type|r|lora_alpha|rank_pattern|alpha_pattern|use_rslora")  # by settings.py
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
_CHANGES_BASE = re.compile(r"pissa.*|olora|corda|loftq|lora_ga|mica", re.IGNORECASE)


def check_allowed(settings: JsonObject) -> None:
    """Raise UsageError for the first setting that is not known to be harmless, with the cure."""
    for key, value in settings.values.items():
        if _READ.fullmatch(key) or _HARMLESS.fullmatch(key) or value in (None, False, "", 0) or value in ([], {}):
            continue
        if key == "init_lora_weights":
            _check_start(settings, value)
        elif key == "bias" and value == "none":
            continue
        else:
            raise UsageError(
                f"{settings.where}: {key} is {shown(value)}, and the kit does not know whether it changes the merged "
                "weight; convert the adapter to a plain LoRA"
            )


def _check_start(settings: JsonObject, value: object) -> None:
    if value is True or (isinstance(value, str) and value.lower() in _PLAIN_STARTS):
        return
    if isinstance(value, str) and _CHANGES_BASE.fullmatch(value):
        raise UsageError(
            f"{settings.where}: init_lora_weights is {value!r}, which changed the base weights before training, so the "
            "factors do not fit the published weights; convert the adapter to a plain LoRA (peft: save_pretrained with "
            "path_initial_model_for_weight_conversion)"
        )
    raise UsageError(
        f"{settings.where}: init_lora_weights is {shown(value)}, which the kit does not know; known: true, false, "
        f"{', '.join(_PLAIN_STARTS)}; convert the adapter to a plain LoRA"
    )
