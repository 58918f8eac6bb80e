"""Read the weights of a part under diffusers' names, whatever file they come from and whoever named them.

black-forest-labs' files hold the queries, keys and values of a double block in one matrix: it is split into thirds,
each a byte range of the file. Their VAE counts decoder blocks in reverse order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from export.names import Target, bfl_linears, bfl_norms
from export.schemes import Scale, check_config, read_scheme
from export.sections import Section, of_section, sections_of
from kit.errors import CheckpointError
from kit.json_object import read_object
from kit.safetensors_file import StoredTensor, read_folder, read_header, read_metadata
from kit.variants import Transformer, Vae, Variant


@dataclass(frozen=True)
class StoredWeights:
    """The tensors of one part by diffusers' names; a tensor with an unknown name keeps it."""

    tensors: Mapping[str, StoredTensor]
    swapped: frozenset[str] = frozenset()  # tensors whose row halves must be exchanged
    scales: Mapping[str, Scale] = field(default_factory=dict)  # of the tensors stored in FP8
    expected: Mapping[str, str] = field(default_factory=dict)  # the file's names for those of diffusers, for messages


def read_single_file(section: Section, file: Path, variant: Variant) -> StoredWeights:
    """Read the tensors of one part from a file, which may hold others too.

    Raises CheckpointError, naming the file and the tensor as stored, for files that are truncated or in an unsupported
    format.
    """
    return _named(section, file, of_section(section, file, read_header(file)), [read_metadata(file)], variant)


def read_part_folder(section: Section, folder: Path, variant: Variant, weights: str | None = None) -> StoredWeights:
    """Read the tensors of one part from its folder in a checkpoint; `weights` is the variant of the files, as bf16.

    Raises CheckpointError as `read_single_file`, and for a config that names a quantization that cannot be exported.
    """
    config = folder / "config.json"
    if config.is_file():
        check_config(read_object(config))
    stored = read_folder(folder, weights)
    files = sorted({tensor.file for tensor in stored.values()})
    return _named(section, folder, stored, [read_metadata(file) for file in files], variant)


def _named(
    section: Section, where: Path, stored: Mapping[str, StoredTensor], headers: list[dict[str, str]], variant: Variant
) -> StoredWeights:
    tensors, scales = read_scheme(where, stored, headers)
    if section == "transformer":
        return _transformer(where, tensors, scales, variant.transformer)
    if section == "vae":
        return StoredWeights(_vae(where, tensors), scales={_vae_name(name, tensors): s for name, s in scales.items()})
    return StoredWeights(tensors, scales=scales)


def _transformer(
    where: Path, stored: Mapping[str, StoredTensor], scales: Mapping[str, Scale], sizes: Transformer
) -> StoredWeights:
    linears, norms = bfl_linears(sizes), bfl_norms(sizes)
    own = {target.module: (Target(target.module),) for targets in linears.values() for target in targets}
    tensors: dict[str, StoredTensor] = {}
    found_scales: dict[str, Scale] = {}
    swapped: set[str] = set()

    def put(name: str, tensor: StoredTensor) -> None:
        if name in tensors:
            raise CheckpointError(
                f"{where}: {tensors[name].key!r} and {tensor.key!r} are the same tensor; remove one of them"
            )
        tensors[name] = tensor

    for name, tensor in stored.items():
        module, _, word = name.rpartition(".")
        if module in norms and word in ("scale", "weight"):
            put(f"{norms[module]}.weight", tensor.renamed(f"{norms[module]}.weight"))
        elif word == "weight" and (targets := linears.get(module) or own.get(module)):
            for target in targets:
                weight = f"{target.module}.weight"
                put(weight, _third(where, tensor, target.third, weight))
                if target.swapped:
                    swapped.add(weight)
                if name in scales:
                    found_scales[weight] = scales[name]
        else:
            put(name, tensor)
            if name in scales:
                found_scales[name] = scales[name]
    theirs = {f"{t.module}.weight": f"{bfl}.weight" for bfl, targets in linears.items() for t in targets}
    theirs |= {f"{norm}.weight": f"{bfl}.scale" for bfl, norm in norms.items()}
    named_by_bfl = any(name.startswith(("double_blocks.", "single_blocks.")) for name in stored)
    return StoredWeights(tensors, frozenset(swapped), found_scales, theirs if named_by_bfl else {})


def _third(where: Path, tensor: StoredTensor, third: int | None, name: str) -> StoredTensor:
    """Return one of the three blocks of rows of a fused matrix, or the whole matrix, under another name."""
    renamed = tensor if tensor.name == name else tensor.renamed(name)
    if third is None:
        return renamed
    if not tensor.shape or tensor.shape[0] % 3:
        raise CheckpointError(
            f"{where}: tensor {tensor.key!r} of shape {list(tensor.shape)} is not a stack of queries, keys and values"
        )
    rows, nbytes = tensor.shape[0] // 3, tensor.nbytes // 3
    return replace(renamed, shape=(rows, *tensor.shape[1:]), offset=tensor.offset + third * nbytes, nbytes=nbytes)


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


def _vae(where: Path, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Rename the tensors of a VAE; 1x1 convolutions of its attention become linears."""
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in stored.items():
        found = _vae_name(name, stored)
        if found in tensors:
            raise CheckpointError(
                f"{where}: {tensors[found].key!r} and {tensor.key!r} are the same tensor; remove one of them"
            )
        shape = tensor.shape
        if re.fullmatch(r".*\.attentions\.0\.to_.*\.weight", found) and shape[2:] == (1, 1):
            shape = shape[:2]
        tensors[found] = replace(tensor if found == name else tensor.renamed(found), shape=shape)
    return tensors


def _vae_name(name: str, stored: Mapping[str, StoredTensor]) -> str:
    """Return diffusers' name of a tensor of a VAE; decoder blocks are counted in reverse order."""
    found = name
    for pattern, replacement in _VAE_RULES:
        found = re.sub(f"^{pattern}$", replacement, found)
    if name.startswith("decoder.up."):
        blocks = [int(match[1]) for other in stored if (match := re.match(r"decoder\.up\.(\d+)\.", other))]
        found = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{max(blocks) - int(match[1])}", found)
    return found


def sizes_of_vae(file: Path, sizes: Vae) -> Vae:
    """Return the sizes of the VAE in a single file; the published small decoder differs from the checkpoint's config.

    The widths of the decoder's blocks are read from their first convolutions. If some of these are missing, the
    config's sizes are returned, and loading the file later fails with the name of the missing tensor.
    """
    tensors = _vae(file, of_section("vae", file, read_header(file)))
    count = len(sizes.decoder_channels)
    firsts = [tensors.get(f"decoder.up_blocks.{i}.resnets.0.conv1.weight") for i in range(count)]
    widths = [tensor.shape[0] for tensor in reversed(firsts) if tensor is not None and tensor.shape]
    return replace(sizes, decoder_channels=tuple(widths)) if len(widths) == count else sizes


def has_decoder_alone(file: Path) -> bool:
    """Return whether a VAE file holds the decoder only, as the published small decoder does."""
    stored = read_header(file)
    names = of_section("vae", file, stored) if "vae" in sections_of(stored) else {}
    return any(n.startswith("decoder.") for n in names) and not any(n.startswith("encoder.") for n in names)
