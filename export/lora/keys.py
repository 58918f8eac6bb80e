"""Map the keys of an adapter file to modules and the roles of their tensors; every key must be recognized."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from export.lora.names import Sizes, Spot, find_spot, nearest, part_of
from kit.errors import UsageError
from kit.safetensors_file import StoredTensor

LowRankRole = Literal["A", "B", "alpha", "diff"]
KroneckerRole = Literal["lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"]
HadamardRole = Literal["hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"]
Role = LowRankRole | KroneckerRole | HadamardRole
_LYCORIS_ROLES: tuple[KroneckerRole | HadamardRole, ...] = (*get_args(KroneckerRole), *get_args(HadamardRole))
_DOWN = ("lora_A", "lora_down", "lora.down", "lora_linear_layer.down")
_UP = ("lora_B", "lora_up", "lora.up", "lora_linear_layer.up")
_FACTOR = re.compile(rf"(.+?)[._]({'|'.join(re.escape(word) for word in (*_DOWN, *_UP))})(?:(?:\.([^.]+))?\.weight)?")
_SCALAR = re.compile(r"(.+)\.(alpha|lora_alpha|network_alpha|diff)")
_LYCORIS = re.compile(r"(.+)\.((?:lokr_w[12](?:_[ab])?)|(?:hada_w[12]_[ab]))(?:\.([^.]+))?")
_DORA = re.compile(r".+\.(dora_scale|lora_magnitude_vector(\.[^.]+)?)")
_BIAS = re.compile(r".+\.(diff_b|lora_[AB]\.bias|bias)")
_SHOWN = 3


@dataclass(frozen=True)
class Key:
    """What a key says: the name of its module, the role of its tensor, and the name of the adapter, "" if none."""

    module: str
    role: Role
    adapter: str = ""


@dataclass
class Module:
    """The tensors of one module of a file by role, and the weights they change."""

    name: str  # as in the file
    spot: Spot
    tensors: dict[Role, StoredTensor] = field(default_factory=dict)


def read_modules(file: Path, stored: Mapping[str, StoredTensor], sizes: Sizes) -> list[Module]:
    """Group the tensors of an adapter file by module.

    Raises UsageError for keys that cannot be applied, with the first of them and their number, for two keys that are
    the same factor, and for a file that holds two adapters.
    """
    modules: dict[tuple[object, ...], Module] = {}
    refused: dict[str, list[str]] = defaultdict(list)
    adapters: dict[str, str] = {}
    unknown: list[str] = []
    for name in stored:
        key = parse(name)
        if _DORA.fullmatch(name):
            refused["dora"].append(name)
        elif key is None:
            refused["bias" if _BIAS.fullmatch(name) else "role"].append(name)
        elif (spot := find_spot(key.module, sizes)) is None:
            refused["text" if part_of(name) == "text_encoder" else "module"].append(name)
            unknown.append(key.module)
        else:
            if key.role not in ("alpha", "diff"):
                adapters.setdefault(key.adapter, name)
            module = modules.setdefault((spot.part, spot.targets, spot.piece), Module(key.module, spot))
            if key.role in module.tensors:
                raise UsageError(f"{file}: keys {module.tensors[key.role].name!r} and {name!r} are the same factor")
            module.tensors[key.role] = stored[name]
    _refuse(file, refused, nearest(unknown[0], sizes) if unknown else None)
    if not modules:
        raise UsageError(f"{file}: holds no tensors, so it is not an adapter")
    if len(adapters) > 1:
        first, second = sorted(adapters.values())[:2]
        raise UsageError(
            f"{file}: {first!r} and {second!r} belong to different adapters; save each of them to a file of its own"
        )
    return list(modules.values())


def parse(name: str) -> Key | None:
    """Split a key into module, role and adapter; None if it is not a factor of a known method."""
    if found := _FACTOR.fullmatch(name):
        return Key(found[1], "A" if found[2] in _DOWN else "B", found[3] or "")
    if found := _SCALAR.fullmatch(name):
        return Key(found[1], "diff" if found[2] == "diff" else "alpha")
    if found := _LYCORIS.fullmatch(name):
        role: Role = next(role for role in _LYCORIS_ROLES if role == found[2])
        return Key(found[1], role, found[3] or "")
    return None


def _refuse(file: Path, refused: Mapping[str, list[str]], near: str | None) -> None:
    hint = f"; the nearest known name is {near!r}" if near else ""
    reasons = {
        "dora": "a DoRA rescales the rows of the merged weight, so its effect is not a sum that can be combined with "
        "other adapters; train or convert it to a plain LoRA",
        "text": f"the adapter changes the text encoder, and that of this variant has no such linear layer{hint}",
        "bias": "the linear layers of FLUX.2 have no bias",
        "role": "not a LoRA, LoHa or LoKr factor and not a full difference; convert the adapter to a plain LoRA",
        "module": "the transformer of this variant has no such linear layer; check that the adapter is for this "
        f"model{hint}",
    }
    for kind, reason in reasons.items():
        if keys := refused.get(kind):
            more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
            names = ", ".join(repr(key) for key in keys[:_SHOWN])
            raise UsageError(f"{file}: cannot apply {names}{more}: {reason}")
