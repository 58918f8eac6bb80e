"""The tiny checkpoints that represent FLUX.2 in tests: real in everything that shapes a graph, and reproducible."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import get_args

import pytest
import torch

from kit import safetensors_file, tiny
from kit.configs import read_variant
from kit.variants import Family


def digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = digests(tiny.save(tmp_path / "a"))
    torch.manual_seed(2)
    assert digests(tiny.save(tmp_path / "b")) == first
    assert digests(tiny.save(tmp_path / "c", tiny.Tiny(seed=1))) != first


def test_making_a_pipeline_leaves_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    tiny.pipeline()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("family", get_args(Family))
def test_a_tiny_checkpoint_is_read_as_its_family(family: Family, tmp_path: Path) -> None:
    variant = read_variant(tiny.save(tmp_path / "checkpoint", tiny.Tiny(family, text_tokens=64)))
    assert variant.family == family
    assert variant.text_tokens == 64
    assert variant.transformer.channels == 128
    assert variant.transformer.guidance_embeds == (family == "dev")
    assert variant.text_encoder.padding_side == ("left" if family == "dev" else "right")


def test_small_decoder_is_read_from_the_config(tmp_path: Path) -> None:
    variant = read_variant(tiny.save(tmp_path / "checkpoint", tiny.Tiny(small_decoder=True)))
    assert variant.vae.channels == (8, 16, 32, 32)
    assert variant.vae.decoder_channels == (8, 16, 24, 24)


def test_shards_hold_the_tensors_of_the_single_file(tmp_path: Path) -> None:
    whole = tiny.save(tmp_path / "whole", dtype="bf16")
    shards = tiny.save(tmp_path / "shards", dtype="bf16", shard_bytes=200_000)
    for part in ("transformer", "text_encoder", "vae"):
        assert len(list((shards / part).glob("*.safetensors"))) > 1
        a, b = safetensors_file.read_folder(whole / part), safetensors_file.read_folder(shards / part)
        assert {name: (t.dtype, t.shape) for name, t in a.items()} == {
            name: (t.dtype, t.shape) for name, t in b.items()
        }
        assert {t.dtype for t in a.values()} <= {"BF16", "I64"}


@pytest.mark.parametrize(("family", "share"), [("klein", 0.05), ("dev", 0.005)])  # dev's system prompt dilutes it
def test_the_prompt_moves_the_velocity(family: Family, share: float) -> None:
    pipe = tiny.pipeline(tiny.Tiny(family))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 128, generator=generator)
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4), torch.arange(1))
    velocity = []
    with torch.no_grad():
        for prompt in ("a red fox in the snow", "two boats on a lake at night"):
            embeds, text_ids = pipe.encode_prompt(prompt)
            velocity.append(
                pipe.transformer(
                    x, embeds, torch.tensor([0.9]), ids, text_ids[0], guidance=torch.tensor([4.0]), return_dict=False
                )[0]
            )
    assert (velocity[0] - velocity[1]).norm() > share * velocity[0].norm()


def test_the_chat_templates_render_the_prompts_of_the_published_models() -> None:
    klein = tiny.pipeline(tiny.Tiny("klein")).tokenizer
    turns = [{"role": "user", "content": "a fox"}]
    assert klein.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False) == (
        "<|im_start|>user\na fox<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    dev = tiny.pipeline(tiny.Tiny("dev")).tokenizer
    turns_of_dev = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("system", "Describe."), ("user", "a fox"))
    ]
    assert dev.apply_chat_template(turns_of_dev, tokenize=False, add_generation_prompt=False) == (
        "<s>[SYSTEM_PROMPT]Describe.[/SYSTEM_PROMPT][INST]a fox[/INST]"
    )
