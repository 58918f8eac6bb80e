"""Choose the tensors of one part from a file that may hold several, and remove the prefixes of its names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

from kit.checkpoint import PartFolder
from kit.errors import CheckpointError
from kit.safetensors_file import StoredTensor

Section = PartFolder
_ORDER: tuple[Section, ...] = ("vae", "text_encoder", "transformer")
_PREFIXES: Mapping[Section, re.Pattern[str]] = {
    "vae": re.compile(r"(vae|first_stage_model)\."),
    "text_encoder": re.compile(
        r"(text_encoders?|cond_stage_model|conditioner\.embedders)\.((?!model\.|transformer\.)[\w-]+\.(?=\w))??"
        r"(transformer\.)?(?=(model|language_model|layers|embed_tokens|norm|lm_head|vision_tower|multi_modal_projector|"
        r"scaled_fp8|tekken_model|spiece_model|logit_scale)\b)"
    ),
    "transformer": re.compile(r"((model\.)?diffusion_model|transformer|unet)\."),
}
# Names that need no prefix to be recognized.
_CONTENT: Mapping[Section, re.Pattern[str]] = {
    "transformer": re.compile(
        r"(model\.)?(double_blocks|single_blocks|transformer_blocks|single_transformer_blocks|img_in|txt_in|x_embedder|"
        r"context_embedder|time_in|guidance_in|time_guidance_embed|final_layer|norm_out|proj_out|"
        r"(double|single)_stream_modulation\w*)\."
    ),
    "vae": re.compile(r"(encoder|decoder|bn|quant_conv|post_quant_conv)\."),
    "text_encoder": re.compile(
        r"(model|language_model)\.(?!diffusion_model)|(layers|embed_tokens|lm_head|vision_tower|multi_modal_projector)\."
    ),
}


def of_section(section: Section, file: Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of one part by their names without prefixes; a tensor keeps its stored name for messages.

    A tensor that belongs to no part known is taken as one of the part, which then refuses it by name. Raises
    CheckpointError for a file without the part, and for two tensors whose names differ only in their prefixes.
    """
    found: dict[str, StoredTensor] = {}
    others: set[str] = set()
    for name, tensor in stored.items():
        place, bare = _place(name)
        if place not in (None, section):
            others.add(str(place))
            continue
        if bare in found:
            raise CheckpointError(
                f"{file}: {found[bare].key!r} and {name!r} are the same tensor of the {section}; remove one of them"
            )
        found[bare] = tensor if bare == name else tensor.renamed(bare)
    if others and not any(_place(tensor.key)[0] == section for tensor in found.values()):
        raise CheckpointError(f"{file}: holds no {section}; it has: {', '.join(sorted(others))}")
    return found


def sections_of(stored: Mapping[str, StoredTensor]) -> set[Section]:
    """Return the parts that a file holds."""
    return {place for place in (_place(name)[0] for name in stored) if place is not None}


def _place(name: str) -> tuple[Section | None, str]:
    """Return the part that a name belongs to, None if it does not say, and the name without prefixes."""
    for section in _ORDER:
        if prefix := _PREFIXES[section].match(name):
            bare = name[prefix.end() :]
            while section == "transformer" and (prefix := _PREFIXES[section].match(bare)):
                bare = bare[prefix.end() :]
            return section, bare.removeprefix("model.") if section == "transformer" else bare
    for known in get_args(Section):
        if _CONTENT[known].match(name):
            return known, name.removeprefix("model.") if known == "transformer" else name
    return None, name
