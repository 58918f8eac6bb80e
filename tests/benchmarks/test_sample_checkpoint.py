"""The shipped sample checkpoint: its files are the released ones, and its images match their prompts."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from transformers import Qwen3ForCausalLM

from benchmarks.sample.denoiser_training import training_scenes
from benchmarks.sample.evaluate import TARGETS, held_out_scenes, quality
from benchmarks.sample.lora_trials import LORA_TARGETS, lora_targets_met
from benchmarks.sample.pipeline import generate, load
from benchmarks.sample.recipe import TrainingRecipe
from benchmarks.sample.training import LIMIT, check_sizes, digests
from kit.sample.judge import read
from kit.sample.world import HELD_OUT_WORDS, UNSEEN_SHAPES, parse, random_scene

SAMPLE = Path("kit/sample")
RESULT = Path("benchmarks/results/sample_quality.json")


@pytest.fixture(scope="module")
def pipe() -> Flux2KleinPipeline:
    return load(SAMPLE / "checkpoint")


def test_the_shipped_files_are_the_released_ones() -> None:
    assert digests(SAMPLE) == json.loads((SAMPLE / "digests.json").read_text())


def test_checkpoint_and_loras_weigh_at_most_sixteen_megabytes() -> None:
    assert check_sizes(SAMPLE) <= LIMIT


def test_the_parts_are_the_familys_own_classes(pipe: Flux2KleinPipeline) -> None:
    assert type(pipe.transformer) is Flux2Transformer2DModel
    assert type(pipe.vae) is AutoencoderKLFlux2
    assert type(pipe.text_encoder) is Qwen3ForCausalLM
    assert pipe.config.is_distilled
    assert pipe.transformer.config.in_channels == 128
    assert pipe.vae.config.latent_channels == 32
    assert pipe.text_encoder.config.num_hidden_layers >= 28
    assert pipe.tokenizer.model_max_length == TrainingRecipe().text_tokens


def test_the_chat_template_renders_qwen3s_single_turn(pipe: Flux2KleinPipeline) -> None:
    said = pipe.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a red circle"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert said == "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_the_published_quality_meets_its_targets() -> None:
    published = json.loads(RESULT.read_text())
    assert published["quality"]["images"] == 300
    assert all(published["quality"][name] >= least for name, least in TARGETS.items())
    assert published["judge_on_true_drawings"]["shapes"] >= 0.995


def test_the_published_star_lora_generates_stars() -> None:
    kind, figure, least = LORA_TARGETS["star"]
    rows = json.loads(RESULT.read_text())["loras"]
    (row,) = (row for row in rows if row["weights"] == {"star": 1.0} and row["prompts"] == kind)
    assert row[figure] >= least


@pytest.mark.xfail(strict=True, reason="77 % of the things are outlines, the aim is 90 %: see kit/sample/README.md")
def test_every_published_target_is_met() -> None:
    published = json.loads(RESULT.read_text())
    assert lora_targets_met(published["loras"])
    assert published["passed"]


def test_no_held_out_scene_was_trained() -> None:
    trained = training_scenes(TrainingRecipe().scenes, TrainingRecipe().seed + 20)
    scenes = held_out_scenes(300, trained)
    assert not set(scenes) & set(trained)
    assert {scene.word for scene in scenes} <= {"", *HELD_OUT_WORDS}


def test_a_few_held_out_prompts_are_generated_as_published(pipe: Flux2KleinPipeline) -> None:
    trained = training_scenes(TrainingRecipe().scenes, TrainingRecipe().seed + 20)
    found = quality(pipe, held_out_scenes(24, trained), 4)
    assert min(found["shapes"], found["colours"]) >= 0.9, found
    assert found["positions"] >= 0.85, found
    assert found["words"] >= 0.7, found


def test_prompts_outside_the_grammar_still_give_an_image(pipe: Flux2KleinPipeline) -> None:
    prompts = ["", "a photo of a cat", "HELLO " * 60, "größe 漢字 🙂"]
    assert [image.shape for image in generate(pipe, prompts, [0, 1, 2, 3])] == [(128, 128, 3)] * 4


def test_the_star_lora_generates_stars_that_the_checkpoint_cannot() -> None:
    pipe, rng = load(SAMPLE / "checkpoint"), random.Random(5)
    scenes = [random_scene(rng, UNSEEN_SHAPES) for _ in range(8)]

    def stars() -> int:
        images = generate(pipe, [scene.prompt() for scene in scenes], list(range(8)))
        return sum(thing.shape == "star" for image in images for thing in read(image).things)

    before = stars()
    pipe.load_lora_weights(SAMPLE / "loras", weight_name="star.safetensors", adapter_name="star")
    assert stars() >= before + 5


def test_the_outline_lora_hollows_shapes_out() -> None:
    pipe = load(SAMPLE / "checkpoint")
    prompts = ["a large red circle on a white background", "a large blue square on a black background"]
    assert all(parse(prompt) for prompt in prompts)

    def styles() -> set[str]:
        return {thing.style for image in generate(pipe, prompts, [3, 4]) for thing in read(image).things}

    assert styles() == {"filled"}
    pipe.load_lora_weights(SAMPLE / "loras", weight_name="outline.safetensors", adapter_name="outline")
    assert styles() == {"outlined"}
