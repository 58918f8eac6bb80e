"""Token ids compared with those that diffusers' pipelines pass to their text encoders."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from kit.errors import ArtifactError, RequestError
from kit.variants import Family
from pipeline.prompts import PromptEncoder
from tests.conftest import ByFamily

PROMPTS = ["a red fox", "Füchse, 狐 & <|im_end|>", "with [IMG] inside", "line\nbreak"]


class Captured(Exception):
    pass


def ids_of_diffusers(checkpoint: Path, pipeline: Any, prompt: str) -> tuple[list[int], list[int]]:
    """Run a pipeline's own prompt encoding and capture the inputs of the text encoder."""
    pipe = pipeline.from_pretrained(checkpoint, dtype=torch.float32)
    seen: dict[str, Any] = {}

    def capture(*_: Any, **inputs: Any) -> None:
        seen.update(inputs)
        raise Captured

    pipe.text_encoder.forward = capture
    with pytest.raises(Captured):
        pipe.encode_prompt(prompt)
    return seen["input_ids"][0].tolist(), seen["attention_mask"][0].tolist()


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize(
    ("family", "pipeline"), [("klein", diffusers.Flux2KleinPipeline), ("dev", diffusers.Flux2Pipeline)]
)
def test_tokens_equal_those_of_diffusers(
    family: Family, pipeline: Any, prompt: str, checkpoint_of: ByFamily, artifact_of: ByFamily
) -> None:
    encoder = PromptEncoder(artifact_of(family) / "tokenizer", "mistral3" if family == "dev" else "qwen3", 512)
    tokens = encoder.encode(prompt)
    ids, mask = ids_of_diffusers(checkpoint_of(family), pipeline, prompt)
    assert (tokens.input_ids.tolist(), tokens.attention_mask.tolist()) == (ids, mask)


def test_a_text_with_too_many_tokens_is_rejected(artifact_of: ByFamily) -> None:
    encoder = PromptEncoder(artifact_of("klein") / "tokenizer", "qwen3", 512)
    room = 512 - len([i for i in encoder.encode("x").attention_mask if i]) + 1
    assert encoder.encode("x" * room).attention_mask.all()
    with pytest.raises(
        RequestError, match="prompt: 513 tokens with the chat template; the limit is 512, .* by 1 tokens"
    ):
        encoder.encode("x" * (room + 1))


def test_dev_needs_its_system_message(artifact_of: ByFamily) -> None:
    with pytest.raises(ArtifactError, match="system_message.txt: missing; the dev text encoder needs it"):
        PromptEncoder(artifact_of("klein") / "tokenizer", "mistral3", 512)


def test_a_tokenizer_in_another_format_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="tokenizer.json: missing; prompts cannot be encoded without it"):
        PromptEncoder(tmp_path, "qwen3", 512)


def test_a_tokenizer_that_cannot_be_loaded_is_named(artifact_of: ByFamily, tmp_path: Path) -> None:
    folder = shutil.copytree(artifact_of("klein") / "tokenizer", tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text('{"model": {"type": "BPE", "vocab": 3}}')
    with pytest.raises(ArtifactError, match="tokenizer: the tokenizer cannot be loaded"):
        PromptEncoder(folder, "qwen3", 512)


def test_a_tokenizer_does_not_import_torch(artifact_of: ByFamily) -> None:
    program = (
        "import sys; from pathlib import Path; from pipeline.prompts import PromptEncoder;"
        "PromptEncoder(Path(sys.argv[1]), 'qwen3', 512).encode('a fox'); print('torch' in sys.modules)"
    )
    argv = [sys.executable, "-c", program, str(artifact_of("klein") / "tokenizer")]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "False\n"
