"""Restore the embedding of a language model whose checkpoint stores it under the name of the tied output head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from export.parts import EMBEDDING
from kit.json_object import read_object
from kit.safetensors_file import StoredTensor

HEAD = "lm_head.weight"
FIRST_NORM = "layers.0.input_layernorm.weight"


def restore_embedding(stored: Mapping[str, StoredTensor], config: Path) -> Mapping[str, StoredTensor]:
    """Use a tied output head as the embedding if the embedding is missing, as the class's own loader does.

    If the config does not say that the two are tied, the tensors are returned as they are, without an embedding.
    """
    heads = [name for name in stored if name.endswith(HEAD)]
    prefixes = [name.removesuffix(FIRST_NORM) for name in stored if name.endswith(FIRST_NORM)]
    if any(name.endswith(EMBEDDING) for name in stored) or len(heads) != 1 or not prefixes or not _is_tied(config):
        return stored
    others = {name: tensor for name, tensor in stored.items() if name != heads[0]}
    return {**others, prefixes[0] + EMBEDDING: stored[heads[0]]}


def _is_tied(config: Path) -> bool:
    outer = read_object(config)
    inner = outer.object("text_config")
    return outer.flag("tie_word_embeddings", inner.flag("tie_word_embeddings", False) if inner else False)
