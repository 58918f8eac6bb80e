"""Define the parts of an artifact: the module that traces each one and the checkpoint tensors it uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from export.graphs.attention import Attention
from export.graphs.kv_cache import CachedGraph, ExtractGraph
from export.graphs.text_encoder import TextEncoderGraph
from export.graphs.transformer import TransformerGraph
from export.graphs.vae import VaeDecoderGraph, VaeEncoderGraph
from kit.errors import CheckpointError
from kit.ports import PartName
from kit.safetensors_file import StoredTensor
from kit.variants import Variant

MODULE = "model."  # the attribute of every graph module that holds the checkpoint's modules
EMBEDDING = "embed_tokens.weight"
NOTHING = r"(?!)"


@dataclass(frozen=True)
class Part:
    """How one part is built and where its files are."""

    folder: str  # the checkpoint folder that holds its weights
    build: Callable[[Variant, Attention], nn.Module]
    unneeded: str  # pattern of tensors in that folder that the graph does not use
    graph: str  # path in the artifact; graphs that share weights share a folder, which holds the weights once

    @property
    def home(self) -> str:
        """Return the artifact folder that holds the graph and its weights."""
        return self.graph.partition("/")[0]


PARTS: Mapping[PartName, Part] = {
    "text_encoder": Part(
        "text_encoder",
        lambda variant, attention: TextEncoderGraph(variant.text_encoder, attention),
        r"layers\.\d+\..*|norm\.weight|(.*\.)?lm_head\.weight|(.*\.)?rotary_emb\.inv_freq"
        r"|(.*\.)?(vision_tower|multi_modal_projector)\..*|tekken_model|spiece_model|logit_scale",
        "text_encoder/model.onnx",
    ),
    "transformer": Part(
        "transformer",
        lambda variant, attention: TransformerGraph(variant.transformer, attention),
        NOTHING,
        "transformer/model.onnx",
    ),
    "transformer_extract": Part(
        "transformer",
        lambda variant, attention: ExtractGraph(variant.transformer, attention),
        NOTHING,
        "transformer/model_extract.onnx",
    ),
    "transformer_cached": Part(
        "transformer",
        lambda variant, attention: CachedGraph(variant.transformer, attention),
        NOTHING,
        "transformer/model_cached.onnx",
    ),
    "vae_encoder": Part(
        "vae",
        lambda variant, attention: VaeEncoderGraph(variant.vae, attention),
        r"bn\.num_batches_tracked|decoder\..*|post_quant_conv\..*",
        "vae_encoder/model.onnx",
    ),
    "vae_decoder": Part(
        "vae",
        lambda variant, attention: VaeDecoderGraph(variant.vae, attention),
        r"bn\.num_batches_tracked|encoder\..*|quant_conv\..*",
        "vae_decoder/model.onnx",
    ),
}


def source_names(part: PartName, stored: Mapping[str, StoredTensor], where: Path) -> dict[str, str]:
    """Map the names that the graph module uses to the names in the checkpoint.

    They differ only in the prefix of a language model, which depends on the class that saved it: "model.",
    "model.language_model." or "language_model.model.". A tensor outside the prefix keeps its full name. Raises
    CheckpointError for a tensor that is stored with and without the prefix.
    """
    if part != "text_encoder":
        return {name: name for name in stored}
    prefix = next((name[: -len(EMBEDDING)] for name in sorted(stored) if name.endswith(EMBEDDING)), "")
    names: dict[str, str] = {}
    for name, tensor in stored.items():
        bare = name.removeprefix(prefix)
        if bare in names:
            raise CheckpointError(
                f"{where}: {stored[names[bare]].key!r} and {tensor.key!r} are the same tensor; remove one of them"
            )
        names[bare] = name
    return names


def is_unneeded(part: PartName, name: str, variant: Variant) -> bool:
    """Return whether a tensor may be left out: layers above the last tap, heads, the other half of the VAE."""
    layer = re.fullmatch(r"layers\.(\d+)\..*", name)
    if (
        part == "text_encoder"
        and layer
        and not max(variant.text_encoder.taps) <= int(layer[1]) < variant.text_encoder.layers
    ):
        return False
    return re.fullmatch(PARTS[part].unneeded, name) is not None
