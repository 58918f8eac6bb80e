"""Map the keys of an adapter file to modules and the roles of their tensors; every key must be recognized.

Files in use differ in three independent ways: the names of modules (black-forest-labs or diffusers, either of them with
underscores), the prefix before these names, and the names of the factors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from export.names import Targets, all_linears
from kit.errors import UsageError
from kit.safetensors_file import StoredTensor
from kit.variants import Transformer

Role = Literal["A", "B", "alpha", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"]
_LOW_RANK: Mapping[str, Role] = {
    "lora_A": "A",
    "lora_down": "A",
    "lora.down": "A",
    "lora_B": "B",
    "lora_up": "B",
    "lora.up": "B",
}
_FACTOR = re.compile(r"(.+)\.(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.default)?\.weight")
_OTHER = re.compile(r"(.+)\.(" + "|".join(role for role in get_args(Role) if len(role) > 1) + ")")
_DORA = re.compile(r".+\.(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)")
_TEXT = re.compile(r"(base_model\.model\.)?(text_encoder|text_encoders|lora_te|lycoris_text|te[123]?[._]|conditioner)")
_PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.")
_UNDERSCORED = ("lora_unet_", "lora_transformer_", "lycoris_")
_SHOWN = 3


@dataclass
class Module:
    """The tensors of one module of a file by role, and the weights they change."""

    name: str  # as in the file
    targets: Targets
    tensors: dict[Role, StoredTensor] = field(default_factory=dict)


def read_modules(file: Path, stored: Mapping[str, StoredTensor], sizes: Transformer) -> list[Module]:
    """Group the tensors of an adapter file by module.

    Raises UsageError for keys that cannot be applied, with the first of them and their number.
    """
    linears = all_linears(sizes)
    names = linears | {name.replace(".", "_"): targets for name, targets in linears.items()}
    modules: dict[str, Module] = {}
    refused: dict[str, list[str]] = defaultdict(list)
    for key in stored:
        parsed = _role(key)
        if _DORA.fullmatch(key):
            refused["dora"].append(key)
        elif _TEXT.match(key):
            refused["text"].append(key)
        elif parsed is None:
            refused["role"].append(key)
        elif (targets := names.get(_bare(parsed[0]))) is None:
            refused["module"].append(key)
        else:
            name, role = parsed
            module = modules.setdefault(_bare(name), Module(name, targets))
            if role in module.tensors:
                raise UsageError(f"{file}: keys {module.tensors[role].name!r} and {key!r} are the same factor")
            module.tensors[role] = stored[key]
    _refuse(file, refused)
    if not modules:
        raise UsageError(f"{file}: holds no tensors, so it is not an adapter")
    return list(modules.values())


def _role(key: str) -> tuple[str, Role] | None:
    """Split a key into the name of its module and the role of its tensor."""
    if factor := _FACTOR.fullmatch(key):
        return factor[1], _LOW_RANK[factor[2]]
    if other := _OTHER.fullmatch(key):
        role: Role = next(role for role in get_args(Role) if role == other[2])
        return other[1], role
    return None


def _bare(name: str) -> str:
    """Remove the prefixes from the name of a module."""
    for prefix in (*_PREFIXES, *_UNDERSCORED):
        name = name.removeprefix(prefix)
    return name


def _refuse(file: Path, refused: Mapping[str, list[str]]) -> None:
    reasons = {
        "dora": "a DoRA rescales the rows of the merged weight, so its effect is not a sum that can be combined with "
        "other adapters; train or convert it to a plain LoRA",
        "text": "the adapter changes the text encoder; only adapters of the transformer can be merged",
        "role": "not a LoRA or LoKr factor; biases, full differences and other methods cannot be merged",
        "module": "the transformer of this variant has no such linear layer; check that the adapter is for this model",
    }
    for kind, reason in reasons.items():
        if keys := refused.get(kind):
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            shown = ", ".join(repr(key) for key in keys[:_SHOWN])
            raise UsageError(f"{file}: cannot apply {shown}{more}: {reason}")
