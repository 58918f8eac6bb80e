"""Published text encoders were saved by several classes; every weight is found, whatever its prefix."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from export.weights import find
from kit import safetensors_file, tiny
from kit.configs import read_variant
from kit.errors import CheckpointError


def rename_weights(checkpoint: Path, rename: Callable[[str], str | None]) -> None:
    """Rename the tensors of the text encoder; None drops a tensor."""
    file = checkpoint / "text_encoder" / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    text = json.dumps({new: header[name] for name in header if (new := rename(name)) is not None}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model.", ""])
@pytest.mark.parametrize("head", [True, False])
def test_a_language_model_is_found_under_every_prefix_with_and_without_its_head(
    tmp_path: Path, prefix: str, head: bool
) -> None:
    checkpoint = tiny.save(tmp_path / "checkpoint", tiny.Tiny("dev", text_tokens=64))
    before = safetensors_file.read_folder(checkpoint / "text_encoder")
    names = {n.removeprefix("language_model.model."): t for n, t in before.items() if "language_model.model." in n}
    shapes = {n: t.shape for n, t in names.items() if re.match(r"embed_tokens|layers\.[12]?\d\.", n)}
    rename_weights(
        checkpoint,
        lambda name: name.replace("language_model.model.", prefix) if head or "lm_head" not in name else None,
    )
    binding = find("text_encoder", read_variant(checkpoint), checkpoint, shapes)
    assert {n: t.shape for n, t in binding.tensors.items()} == shapes
    assert all(t.name == prefix + n for n, t in binding.tensors.items())


@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_stored_as_the_head_is_found_where_both_are_one_matrix(tmp_path: Path, tied: bool) -> None:
    checkpoint = tiny.save(tmp_path / "checkpoint", tiny.Tiny(text_tokens=64))
    before = safetensors_file.read_folder(checkpoint / "text_encoder")
    shapes = {
        n[6:]: t.shape for n, t in before.items() if re.match(r"model\.(embed_tokens|layers\.(1?\d|2[0-6])\.)", n)
    }
    rename_weights(checkpoint, lambda name: "lm_head.weight" if name == "model.embed_tokens.weight" else name)
    config = checkpoint / "text_encoder" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": tied}))
    if tied:
        binding = find("text_encoder", read_variant(checkpoint), checkpoint, shapes)
        assert binding.tensors["embed_tokens.weight"].name == "lm_head.weight"
    else:
        with pytest.raises(CheckpointError, match="tensor 'embed_tokens.weight' of shape .* is missing"):
            find("text_encoder", read_variant(checkpoint), checkpoint, shapes)
