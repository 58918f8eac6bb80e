"""Training of the sample with a micro recipe: it resumes exactly, reports errors and writes a real pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.sample.curve import smoothed, write_curve
from benchmarks.sample.denoiser_training import noise_levels, pipeline_sigmas
from benchmarks.sample.loras import train_lora
from benchmarks.sample.models import TAPS, build_text_encoder, build_vae, has_bfloat16
from benchmarks.sample.optimizer import orthogonal
from benchmarks.sample.pipeline import generate, load
from benchmarks.sample.recipe import Stage, TrainingRecipe
from benchmarks.sample.text_training import SLOTS, encode, facts, slot_starts
from benchmarks.sample.tokenizer import build_tokenizer, lower_case_words
from benchmarks.sample.trainer import rate_at, train
from benchmarks.sample.training import check_sizes, claim, train_checkpoint
from kit.sample.world import SHAPES, UNSEEN_SHAPES, parse, random_scene

SHORT = Stage(2, 2, 1e-3, warmup=1)
MICRO = replace(
    TrainingRecipe(),
    text_width=32,
    text_hidden=32,
    vae_channels=(16, 16, 16, 16),
    heads=2,
    head_width=16,
    double_blocks=1,
    single_blocks=1,
    images=16,
    scenes=4,
    text=SHORT,
    vae=SHORT,
    vae_whole=SHORT,
    vae_polish=SHORT,
    vae_sharp=SHORT,
    vae_faint=SHORT,
    hard_images=4,
    denoiser=SHORT,
    denoiser_long=SHORT,
    denoiser_settle=SHORT,
    denoiser_finish=SHORT,
    denoiser_last=SHORT,
    denoiser_hard=SHORT,
    settled_scenes=4,
    edit=Stage(2, 3, 1e-3, warmup=1),
    edit_long=Stage(2, 3, 1e-3, warmup=1),
    lora=SHORT,
    lora_scenes=4,
)


class Interrupted(Exception):
    """Simulates a killed process."""


def _line() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 16)


def _losses(model: nn.Linear, folder: Path, stop: int | None = None, steps: int = 12) -> list[float]:
    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        if step == stop:
            raise Interrupted
        x = torch.randn(8, 32, generator=generator)
        loss: Tensor = (model(x) - x[:, :16]).square().mean()
        return loss

    return train("line", Stage(steps, 8, 1e-2, warmup=3), model, loss_at, folder, seed=1).losses


def test_an_interrupted_stage_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.sample.trainer.SAVE_EVERY", 0.0)
    whole, broken, resumed = _line(), _line(), _line()
    losses = _losses(whole, tmp_path / "whole")
    with pytest.raises(Interrupted):
        _losses(broken, tmp_path / "broken", stop=7)
    assert _losses(resumed, tmp_path / "broken") == losses
    assert torch.equal(whole.weight, resumed.weight)
    assert torch.equal(whole.bias, resumed.bias)


def test_a_finished_stage_is_not_trained_again(tmp_path: Path) -> None:
    first, second = _line(), _line()
    losses = _losses(first, tmp_path)
    assert _losses(second, tmp_path, stop=0) == losses
    assert torch.equal(first.weight, second.weight)


def test_a_checkpoint_of_other_length_is_refused(tmp_path: Path) -> None:
    _losses(_line(), tmp_path)
    with pytest.raises(
        ValueError, match=r"line.safetensors is from a training of 12 steps with seed 1, requested are 5"
    ):
        _losses(_line(), tmp_path, steps=5)


def test_a_loss_that_is_no_number_stops_the_stage(tmp_path: Path) -> None:
    model = _line()
    with pytest.raises(FloatingPointError, match="stage bad: the loss is nan at step 0; lower its learning rate"):
        train("bad", SHORT, model, lambda step, generator: model(torch.full((1, 32), torch.nan)).sum(), tmp_path, 1)


def test_the_rate_warms_up_and_falls_to_nothing() -> None:
    stage = Stage(100, 1, 1.0, warmup=10)
    rates = [rate_at(stage, step) for step in range(100)]
    assert rates[0] == 0.1
    assert max(rates) == 1.0
    assert rates[-1] < 0.001


def test_muon_makes_singular_values_nearly_equal() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(48, 20)))
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_four_steps_visit_the_familys_noise_levels() -> None:
    assert pipeline_sigmas(64).tolist() == pytest.approx([1.0, 0.9547, 0.8754, 0.7007], abs=1e-4)
    levels = noise_levels(1000, pipeline_sigmas(64), 0.5, torch.Generator().manual_seed(0))
    assert levels.min() >= 0
    assert levels.max() == 1.0


def test_words_of_the_grammar_are_one_token_and_capitals_are_spelled() -> None:
    tokenizer = build_tokenizer(48)
    assert all(len(tokenizer(f" {word}")["input_ids"]) == 1 for word in lower_case_words())
    assert tokenizer.tokenize(" HELLO") == ["Ġ", "H", "E", "L", "L", "O"]
    assert (
        tokenizer.decode(tokenizer("a red star, with the word QUIZ")["input_ids"]) == "a red star, with the word QUIZ"
    )


def test_the_longest_sentence_fits_the_text_length() -> None:
    tokenizer = build_tokenizer(TrainingRecipe().text_tokens)
    things = "a small red circle, a large blue square and a small pink heart"
    longest = f"{things} in a column on a gray background, with the word HELLO"
    parse(longest)
    assert slot_starts(tokenizer, [longest])[0] + SLOTS <= TrainingRecipe().text_tokens


def test_slots_are_the_template_tokens_after_the_prompt() -> None:
    tokenizer = build_tokenizer(48)
    prompt = "a red circle on a white background"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, enable_thinking=False, return_dict=True
    )["input_ids"]
    start = slot_starts(tokenizer, [prompt])[0]
    assert ids[start] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert len(ids) == start + SLOTS
    assert [len(fact) for fact in facts(parse(prompt))] == [5, 5, 5, 1, 2, 2, 2, 2, 2]


def test_every_scene_has_facts() -> None:
    import random

    rng = random.Random(3)
    assert all(len(facts(random_scene(rng, SHAPES + UNSEEN_SHAPES))) == SLOTS for _ in range(200))


def test_a_cpu_without_bfloat16_products_trains_in_float32() -> None:
    assert has_bfloat16({"avx512_bf16": True})
    assert has_bfloat16({"amx_bf16": True, "avx512_bf16": False})
    assert not has_bfloat16({"avx512_f": True, "avx512_vnni": True, "avx512_bf16": False})


def test_prompt_features_are_the_three_taps() -> None:
    tokenizer = build_tokenizer(48)
    encoder = build_text_encoder(MICRO, len(tokenizer), tokenizer.pad_token_id).eval()
    assert encode(encoder, tokenizer, ["a red circle", "anything at all, 123"]).shape == (2, 48, len(TAPS) * 32)


# under autocast PyTorch normalizes queries and keys without its fused kernel, and warns about it once
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_micro_training_writes_a_pipeline_that_generates_and_learns_a_lora(tmp_path: Path) -> None:
    out = tmp_path / "sample"
    runs = train_checkpoint(MICRO, tmp_path / "work", out / "checkpoint")
    names = [
        "text",
        "vae",
        "vae_whole",
        "vae_polish",
        "vae_sharp",
        "vae_faint",
        "denoiser",
        "denoiser_long",
        "denoiser_settle",
        "denoiser_finish",
        "denoiser_last",
        "denoiser_hard",
        "denoiser_edit",
        "denoiser_edit_long",
    ]
    assert [(run.name, len(run.losses)) for run in runs] == [(name, 2) for name in names]
    pipe = load(out / "checkpoint")
    assert pipe.config.is_distilled
    assert pipe.tokenizer.model_max_length == 48
    image = next(generate(pipe, ["a red circle"], [0]))
    assert image.shape == (128, 128, 3)
    train_lora("star", out / "checkpoint", out / "loras", MICRO, tmp_path / "work")
    pipe.load_lora_weights(out / "loras", weight_name="star.safetensors", adapter_name="star")
    assert pipe.get_list_adapters() == {"transformer": ["star"]}
    assert check_sizes(out) < 16_000_000


def test_a_work_folder_of_another_recipe_is_refused(tmp_path: Path) -> None:
    claim(tmp_path, MICRO)
    claim(tmp_path, MICRO)
    with pytest.raises(ValueError, match="holds a training with another recipe"):
        claim(tmp_path, replace(MICRO, seed=9))


def test_a_folder_that_weighs_too_much_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loras").mkdir()
    (tmp_path / "loras" / "x.safetensors").write_bytes(b"0" * 600_000)
    with pytest.raises(ValueError, match="x.safetensors has 600000 bytes, the limit is 500000; lower lora_rank"):
        check_sizes(tmp_path)
    monkeypatch.setattr("benchmarks.sample.training.LIMIT", 100_000)
    with pytest.raises(ValueError, match="has 600000 bytes, the limit is 100000"):
        check_sizes(tmp_path)


def test_unknown_lora_and_missing_checkpoint_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown LoRA 'moon'; there are: star, outline"):
        train_lora("moon", tmp_path, tmp_path, MICRO, tmp_path)
    with pytest.raises(FileNotFoundError, match="model_index.json is missing"):
        load(tmp_path)


def test_the_vae_starts_with_silent_branches() -> None:
    weights = dict(build_vae(MICRO).named_parameters())
    branches = [weight for name, weight in weights.items() if name.endswith("conv2.weight")]
    assert branches
    assert max(weight.detach().abs().max().item() for weight in branches) < 0.01


def test_a_loss_curve_has_a_panel_per_stage(tmp_path: Path) -> None:
    from PIL import Image

    assert smoothed([1.0, 1.0, 1.0]) == pytest.approx([1.0] * 3)
    write_curve({"a": [2.0, 1.0, 0.5], "b": [1.0]}, tmp_path / "curve.png")
    with Image.open(tmp_path / "curve.png") as image:
        assert image.size == (600, 220)
