"""Map black-forest-labs' names of the transformer's linear layers to diffusers' names.

Two mappings are more than a rename: black-forest-labs' files hold the queries, keys and values of a double block in one
matrix, and the rows of their last modulation are (shift, scale) where diffusers has (scale, shift).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from kit.variants import Transformer


@dataclass(frozen=True)
class Target:
    """What a stored matrix corresponds to: a linear layer of diffusers' transformer, or a third of its rows."""

    module: str
    third: int | None = None  # 0, 1 or 2: queries, keys or values of a fused matrix
    swapped: bool = False  # the halves of the rows are in the opposite order in diffusers


Targets = tuple[Target, ...]
IMAGE_QKV = ("to_q", "to_k", "to_v")
TEXT_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")
ALIAS = ("transformer_blocks.", "sformer_blocks.")  # some exporters truncate the first to the second

_TOP: Mapping[str, str] = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
}
_GUIDANCE: Mapping[str, str] = {
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
}
_DOUBLE: Mapping[str, str] = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_SINGLE: Mapping[str, str] = {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"}
_DOUBLE_NORMS: Mapping[str, str] = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS: Mapping[str, str] = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def bfl_linears(sizes: Transformer) -> dict[str, Targets]:
    """Map black-forest-labs' name of every linear layer of a transformer to its targets."""
    found: dict[str, Targets] = {bfl: (Target(module),) for bfl, module in _TOP.items()}
    found["final_layer.adaLN_modulation.1"] = (Target("norm_out.linear", swapped=True),)
    if sizes.guidance_embeds:
        found |= {bfl: (Target(module),) for bfl, module in _GUIDANCE.items()}
    for i in range(sizes.double_blocks):
        block = f"transformer_blocks.{i}"
        found |= {f"double_blocks.{i}.{bfl}": (Target(f"{block}.{module}"),) for bfl, module in _DOUBLE.items()}
        found[f"double_blocks.{i}.img_attn.qkv"] = _thirds(f"{block}.attn", IMAGE_QKV)
        found[f"double_blocks.{i}.txt_attn.qkv"] = _thirds(f"{block}.attn", TEXT_QKV)
    for i in range(sizes.single_blocks):
        block = f"single_transformer_blocks.{i}"
        found |= {f"single_blocks.{i}.{bfl}": (Target(f"{block}.{module}"),) for bfl, module in _SINGLE.items()}
    return found


def bfl_norms(sizes: Transformer) -> dict[str, str]:
    """Map black-forest-labs' name of every query or key norm to diffusers' name, both without the last component."""
    return {
        f"{bfl_block}_blocks.{i}.{bfl}": f"{block}_blocks.{i}.{norm}"
        for bfl_block, block, count, norms in (
            ("double", "transformer", sizes.double_blocks, _DOUBLE_NORMS),
            ("single", "single_transformer", sizes.single_blocks, _SINGLE_NORMS),
        )
        for i in range(count)
        for bfl, norm in norms.items()
    }


def all_linears(sizes: Transformer) -> dict[str, Targets]:
    """Map every name in use for a linear layer to its targets: black-forest-labs, diffusers, fused diffusers, aliases.

    Some trainers replace the dots of these names by underscores; the caller adds those spellings.
    """
    found = bfl_linears(sizes)
    own: dict[str, Targets] = {t.module: (Target(t.module),) for targets in found.values() for t in targets}
    for i in range(sizes.double_blocks):
        attn = f"transformer_blocks.{i}.attn"
        own[f"{attn}.to_qkv"] = _thirds(attn, IMAGE_QKV)
        own[f"{attn}.to_added_qkv"] = _thirds(attn, TEXT_QKV)
    name, alias = ALIAS
    own |= {alias + key.removeprefix(name): targets for key, targets in own.items() if key.startswith(name)}
    return found | own


def _thirds(attn: str, names: tuple[str, str, str]) -> Targets:
    return tuple(Target(f"{attn}.{name}", third) for third, name in enumerate(names))
