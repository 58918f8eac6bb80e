"""Read the weights of a transformer or VAE from one file with black-forest-labs' names, under diffusers' names.

A fused matrix is split into thirds, each a byte range of the file. FP8 files also hold one fp32 scale per matrix
(`weight_scale`). Their `input_scale` is meant for runtimes that multiply in FP8; graphs that compute in a wider type
ignore it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from export.names import Target, bfl_linears, bfl_norms
from export.values import read_all
from kit.errors import CheckpointError
from kit.safetensors_file import StoredTensor, read_header
from kit.variants import Transformer, Vae, Variant

FP8 = "F8_E4M3"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "first_stage_model.", "vae.")


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of one part by diffusers' names; a tensor with an unknown name keeps it."""

    tensors: Mapping[str, StoredTensor]
    swapped: frozenset[str] = frozenset()  # tensors whose row halves must be exchanged
    scales: Mapping[str, StoredTensor] = field(default_factory=dict)  # one number per FP8 tensor


def read_single_file(folder: str, file: Path, variant: Variant) -> StoredWeights:
    """Read the tensors of one file that replaces a checkpoint folder ("transformer" or "vae").

    Raises CheckpointError, naming the file and the tensor, for files that are truncated or in an unsupported format.
    """
    stored = {_bare(name): tensor for name, tensor in read_header(file).items()}
    return _transformer(file, stored, variant.transformer) if folder == "transformer" else StoredWeights(_vae(stored))


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _transformer(file: Path, stored: Mapping[str, StoredTensor], sizes: Transformer) -> StoredWeights:
    linears, norms = bfl_linears(sizes), bfl_norms(sizes)
    own = {target.module: (Target(target.module),) for targets in linears.values() for target in targets}
    tensors: dict[str, StoredTensor] = {}
    scales: dict[str, StoredTensor] = {}
    swapped: set[str] = set()
    scaled = {name.removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == FP8}
    for name, tensor in stored.items():
        module, _, word = name.rpartition(".")
        if word == "weight_scale_2":
            raise CheckpointError(
                f"{file}: {tensor.name!r} belongs to NVFP4, which cannot be exported; use the BF16 or FP8 file"
            )
        if word == "weight_scale" and module in scaled:
            if math.prod(tensor.shape) != 1 or tensor.dtype != "F32":
                raise CheckpointError(
                    f"{file}: {tensor.name!r} is {tensor.dtype} of shape {list(tensor.shape)}; only FP8 with one F32 "
                    "scale per tensor can be exported"
                )
            if not 0 < (value := float(read_all(tensor).reshape(()))) < math.inf:
                raise CheckpointError(f"{file}: {tensor.name!r} is {value}; a scale must be positive and finite")
        elif word == "input_scale" and module in scaled:
            pass
        elif module in norms and word in ("scale", "weight"):
            tensors[f"{norms[module]}.weight"] = replace(tensor, name=f"{norms[module]}.weight")
        elif word == "weight" and (targets := linears.get(module) or own.get(module)):
            for target in targets:
                weight = f"{target.module}.weight"
                tensors[weight] = _third(file, tensor, target.third, weight)
                if target.swapped:
                    swapped.add(weight)
                if tensor.dtype == FP8 and (scale := stored.get(f"{module}.weight_scale")):
                    scales[weight] = replace(scale, name=f"{weight}_scale", shape=())
        else:
            tensors[name] = tensor
    return StoredWeights(tensors, frozenset(swapped), scales)


def _third(file: Path, tensor: StoredTensor, third: int | None, name: str) -> StoredTensor:
    """Return one of the three blocks of rows of a fused matrix, or the whole matrix, under another name."""
    if third is None:
        return replace(tensor, name=name)
    if not tensor.shape or tensor.shape[0] % 3:
        raise CheckpointError(
            f"{file}: tensor {tensor.name!r} of shape {list(tensor.shape)} is not a stack of queries, keys and values"
        )
    rows, nbytes = tensor.shape[0] // 3, tensor.nbytes // 3
    return replace(
        tensor, name=name, shape=(rows, *tensor.shape[1:]), offset=tensor.offset + third * nbytes, nbytes=nbytes
    )


_VAE_RULES: tuple[tuple[str, str], ...] = (
    (r"encoder\.(quant_conv\..*)", r"\1"),
    (r"decoder\.(post_quant_conv\..*)", r"\1"),
    (r"(encoder|decoder)\.norm_out\.(.*)", r"\1.conv_norm_out.\2"),
    (r"encoder\.down\.(\d+)\.downsample\.(.*)", r"encoder.down_blocks.\1.downsamplers.0.\2"),
    (r"encoder\.down\.(\d+)\.block\.(.*)", r"encoder.down_blocks.\1.resnets.\2"),
    (r"decoder\.up\.(\d+)\.upsample\.(.*)", r"decoder.up_blocks.\1.upsamplers.0.\2"),
    (r"decoder\.up\.(\d+)\.block\.(.*)", r"decoder.up_blocks.\1.resnets.\2"),
    (r"(encoder|decoder)\.mid\.block_1\.(.*)", r"\1.mid_block.resnets.0.\2"),
    (r"(encoder|decoder)\.mid\.block_2\.(.*)", r"\1.mid_block.resnets.1.\2"),
    (r"(.*)\.nin_shortcut\.(.*)", r"\1.conv_shortcut.\2"),
    (r"(encoder|decoder)\.mid\.attn_1\.norm\.(.*)", r"\1.mid_block.attentions.0.group_norm.\2"),
    (r"(encoder|decoder)\.mid\.attn_1\.([qkv])\.(.*)", r"\1.mid_block.attentions.0.to_\2.\3"),
    (r"(encoder|decoder)\.mid\.attn_1\.proj_out\.(.*)", r"\1.mid_block.attentions.0.to_out.0.\2"),
)


def _vae(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Rename the tensors of a VAE; decoder blocks are counted in reverse order and 1x1 convolutions become linears."""
    blocks = {int(match[1]) for name in stored if (match := re.match(r"decoder\.up\.(\d+)\.", name))}
    tensors = {}
    for name, tensor in stored.items():
        found = name
        for pattern, replacement in _VAE_RULES:
            found = re.sub(f"^{pattern}$", replacement, found)
        if name.startswith("decoder.up."):
            found = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{max(blocks) - int(match[1])}", found)
        shape = tensor.shape
        if re.fullmatch(r".*\.attentions\.0\.to_.*\.weight", found) and shape[2:] == (1, 1):
            shape = shape[:2]
        tensors[found] = replace(tensor, name=found, shape=shape)
    return tensors


def sizes_of_vae(file: Path, sizes: Vae) -> Vae:
    """Return the sizes of the VAE in a single file; the published small decoder differs from the checkpoint's config.

    The widths of the decoder's blocks are read from their first convolutions. If some of these are missing, the
    config's sizes are returned, and loading the file later fails with the name of the missing tensor.
    """
    tensors = _vae({_bare(name): tensor for name, tensor in read_header(file).items()})
    count = len(sizes.decoder_channels)
    firsts = [tensors.get(f"decoder.up_blocks.{i}.resnets.0.conv1.weight") for i in range(count)]
    widths = [tensor.shape[0] for tensor in reversed(firsts) if tensor is not None and tensor.shape]
    return replace(sizes, decoder_channels=tuple(widths)) if len(widths) == count else sizes


def has_decoder_alone(file: Path) -> bool:
    """Return whether a VAE file holds the decoder only, as the published small decoder does."""
    names = [_bare(name) for name in read_header(file)]
    return any(n.startswith("decoder.") for n in names) and not any(n.startswith("encoder.") for n in names)
