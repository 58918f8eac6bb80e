"""Training the sample to edit: references follow the image's tokens as in the pipeline, and edits are judged."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor, nn

from benchmarks.sample.denoiser_training import flow_loss, pipeline_sigmas, reference_ids
from benchmarks.sample.edit_training import changed_tokens, edit_weights, training_edits
from benchmarks.sample.edit_trials import (
    EDIT_TARGETS,
    Trial,
    edit_quality,
    edit_targets_met,
    held_out_edits,
    judge_edit_drawings,
    share,
)
from benchmarks.sample.latents import Examples
from kit.sample.draw import draw
from kit.sample.edits import Edit, Remove, SetWord, apply, picture_of
from kit.sample.world import HELD_OUT_WORDS, parse, random_scene


class Recorder(nn.Module):
    """Stands for a transformer: keeps its inputs and returns zeros."""

    def forward(self, **inputs: Tensor) -> Any:
        self.inputs = inputs
        return SimpleNamespace(sample=torch.zeros_like(inputs["hidden_states"]))


def _examples(count: int = 3) -> Examples:
    latents, features = torch.randn(count, 128, 8, 8), torch.randn(count, 5, 6)
    return Examples(
        tokens=Flux2KleinPipeline._pack_latents(latents),
        features=features,
        image_ids=Flux2KleinPipeline._prepare_latent_ids(latents[:1])[0],
        text_ids=Flux2KleinPipeline._prepare_text_ids(features[:1])[0],
        references=torch.randn(2, 64, 128),
        sources=torch.tensor([1, 0, 1]),
    )


def test_reference_tokens_follow_the_images_and_have_the_pipelines_position_ids() -> None:
    data, seen = _examples(), Recorder()
    rows = torch.tensor([2, 1])
    loss = flow_loss(seen, data, rows, pipeline_sigmas(64), torch.Generator().manual_seed(0))
    hidden, ids = seen.inputs["hidden_states"], seen.inputs["img_ids"]
    assert data.references is not None
    assert torch.equal(hidden[:, 64:], data.references[[1, 0]])
    assert torch.equal(ids[:64], data.image_ids)
    assert torch.equal(ids[64:], Flux2KleinPipeline._prepare_image_ids([torch.zeros(1, 128, 8, 8)])[0])
    noise = torch.randn((2, 64, 128), generator=torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx((noise - data.tokens[rows]).square().mean().item())  # image tokens alone


def test_reference_ids_differ_from_the_images_in_time_alone() -> None:
    ids = _examples().image_ids
    assert torch.equal(reference_ids(ids)[:, 1:], ids[:, 1:])
    assert reference_ids(ids)[:, 0].tolist() == [10] * 64


def test_training_edits_have_no_held_out_word() -> None:
    rng = random.Random(0)
    edits = training_edits([random_scene(rng) for _ in range(300)], 2, seed=1)
    assert len(edits) == 600
    words = {edit.word for edit in edits if isinstance(edit, SetWord)}
    assert len(words) > 50
    assert not words & set(HELD_OUT_WORDS)


def test_changed_tokens_and_removed_things_weigh_more_than_background() -> None:
    before = picture_of(parse("a red circle at the left"))
    after = apply(Remove("circle"), before)
    data = _examples(1)
    settled = replace(data, tokens=torch.zeros(1, 64, 128))
    tokens = torch.zeros(1, 64, 128)
    tokens[0, 3 * 8 + 1] = 1.0  # the token at the circle's centre, (24, 54)
    changed = changed_tokens(settled, replace(data, tokens=tokens, sources=torch.tensor([0])))
    assert changed.nonzero().tolist() == [[0, 25]]
    weights = edit_weights([before], [after], changed, 8.0)[0]
    assert weights.mean() == pytest.approx(1)
    thing = 1 + 4 * 9 / 13  # of a thing of middle size, see thing_weights
    assert weights[25] / weights[63] == pytest.approx(8 * thing, rel=1e-3)
    assert weights[24] / weights[63] == pytest.approx(thing, rel=1e-3)  # part of the circle, but unchanged


class Editor:
    """Stands for a pipeline: returns the drawing of an edit's result, or of the unedited reference."""

    tokenizer = SimpleNamespace(model_max_length=48)

    def __init__(self, trials: list[Trial], obeys: bool) -> None:
        self.trials, self.obeys = iter(trials), obeys

    def __call__(self, image: Any, prompt: str, **options: Any) -> Any:
        trial = next(self.trials)
        assert prompt == str(trial.edit)
        assert np.array_equal(np.asarray(image), draw(trial.before))
        result = apply(trial.edit, trial.before) if self.obeys else trial.before
        return SimpleNamespace(images=[draw(result) / 255])


@pytest.mark.parametrize("obeys", [True, False])
def test_made_edits_are_counted_and_what_stayed_too(obeys: bool) -> None:
    trials = held_out_edits(20, ())
    found = edit_quality(Editor(trials, obeys), trials)
    assert found["made"]["share"] == obeys
    assert found["stayed"]["share"] == found["all_stayed"]["share"] == 1
    assert sum(kind["made"]["of"] for kind in found["kinds"].values()) == 20
    assert edit_targets_met(found) is obeys


def test_the_judge_is_right_on_every_true_result_and_every_unedited_image() -> None:
    found = judge_edit_drawings(held_out_edits(60, ()))
    assert found["true_results"]["made"]["share"] == 1
    assert found["unedited"]["made"]["share"] == 0
    assert found["true_results"]["stayed"]["share"] == found["unedited"]["stayed"]["share"] == 1


def test_no_held_out_edit_starts_from_a_training_scene() -> None:
    first = held_out_edits(5, ())
    rng = random.Random(2027)
    trained = [random_scene(rng, words=HELD_OUT_WORDS)]
    again = held_out_edits(5, trained)
    assert picture_of(trained[0]) == first[0].before
    assert all(trial.before != first[0].before for trial in again)


def test_a_share_has_the_wilson_interval() -> None:
    assert share(190, 200) == {"share": 0.95, "low": 0.9104, "high": 0.9726, "of": 200}
    assert EDIT_TARGETS == {"made": 0.9, "stayed": 0.95}


def test_an_instruction_fits_the_text_length() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("kit/sample/checkpoint/tokenizer")
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(400)]
    edits: list[Edit] = training_edits(scenes, 1, seed=2)
    longest = max(len(ids) for ids in tokenizer([str(edit) for edit in edits])["input_ids"])
    assert longest + 12 <= 48  # the template takes 12
