"""Continuing from finished weights: only the last stages run, and the other parts stay identical."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.sample.__main__ import main
from benchmarks.sample.continuing import go_on, keep_start
from benchmarks.sample.decoder_training import FAINT, hard_images
from benchmarks.sample.latents import token_weights
from benchmarks.sample.models import build_text_encoder, build_transformer, build_vae
from benchmarks.sample.pipeline import assemble, load, write
from benchmarks.sample.tokenizer import build_tokenizer
from benchmarks.sample.training import digests
from benchmarks.sample.vae_training import image_loss
from kit.sample.world import SIDE, random_scene
from tests.benchmarks.test_sample_training import MICRO


@pytest.fixture
def start(tmp_path: Path) -> Path:
    tokenizer = build_tokenizer(MICRO.text_tokens)
    encoder = build_text_encoder(MICRO, len(tokenizer), tokenizer.pad_token_id)
    folder = tmp_path / "finished"
    write(assemble(build_vae(MICRO), encoder, tokenizer, build_transformer(MICRO)), folder)
    return folder


# under autocast PyTorch normalizes queries and keys without its fused kernel, and warns about it once
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_a_finished_checkpoint_goes_on_through_the_last_stages_in_its_own_place(start: Path, tmp_path: Path) -> None:
    before = digests(start)
    runs = go_on(MICRO, tmp_path / "work", start, start)
    last = ["vae_sharp", "vae_faint", "denoiser_last", "denoiser_hard", "denoiser_edit", "denoiser_edit_long"]
    assert [run.name for run in runs] == last
    after = digests(start)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"transformer/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"}
    was, now = load(tmp_path / "work" / "start").vae, load(start).vae
    for part in ("encoder", "quant_conv", "bn"):
        kept = getattr(was, part).state_dict()
        assert all(torch.equal(kept[name], value) for name, value in getattr(now, part).state_dict().items())
    # run again after it has finished, it trains nothing and leaves the same weights
    again = go_on(MICRO, tmp_path / "work", start, start)
    assert [run.losses for run in again] == [run.losses for run in runs]
    assert digests(start) == after


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_the_edit_stages_alone_change_only_the_transformer(start: Path, tmp_path: Path) -> None:
    before = digests(start)
    runs = go_on(MICRO, tmp_path / "work", start, start, stages="edit")
    assert [run.name for run in runs] == ["denoiser_edit", "denoiser_edit_long"]
    after = digests(start)
    changed = {path for path in before if before[path] != after[path]}
    assert changed == {"transformer/diffusion_pytorch_model.safetensors"}


def test_a_work_folder_that_goes_on_from_another_checkpoint_is_refused(start: Path, tmp_path: Path) -> None:
    work, other = tmp_path / "work", tmp_path / "other"
    work.mkdir()
    assert digests(keep_start(start, work)) == digests(start)
    pipe = load(start)
    pipe.transformer = build_transformer(replace(MICRO, seed=9))
    write(pipe, other)
    with pytest.raises(ValueError, match="work continues another checkpoint than .*other; remove it or choose anot"):
        keep_start(other, work)


def test_a_start_that_is_not_there_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["train", "--from", str(tmp_path / "no"), "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert main(told) == 2
    assert "no holds no checkpoint (model_index.json is missing); train one first" in capsys.readouterr().err
    assert not (tmp_path / "work" / "start").exists()


def test_tokens_of_small_things_weigh_most_and_plain_ground_least() -> None:
    rng = random.Random(4)
    scenes = [random_scene(rng) for _ in range(50)]
    weights = token_weights(scenes)
    assert weights.shape == (50, (SIDE // 16) ** 2)
    assert weights.mean() == pytest.approx(1)
    for scene, row in zip(scenes, weights, strict=True):
        for thing, (x, y) in zip(scene.things, scene.centres(), strict=True):
            there = row[y // 16 * 8 + x // 16] / row[-1]  # the last token is an empty corner
            assert there == pytest.approx({"small": 5.0, "": 1 + 36 / 13, "large": 1 + 36 / 17}[thing.size])


def test_a_faint_edge_weighs_as_much_as_a_strong_one() -> None:
    """A wrong pixel on an edge of gray and a wrong pixel on an edge of black and white."""

    def cost(light: float, faint: bool) -> float:
        wanted = torch.zeros(1, 3, 32, 32)
        wanted[..., 16:] = light
        made = wanted.clone()
        made[..., 16, 16] += 0.1
        return image_loss(made, wanted, faint).item()

    assert cost(0.7, faint=True) == pytest.approx(cost(1.0, faint=True), rel=1e-3)
    assert cost(0.7, faint=False) < 0.9 * cost(1.0, faint=False)


def test_hard_images_stand_on_the_backgrounds_asked_for() -> None:
    drawn = hard_images(6, 1, ("gray",))
    assert drawn.shape == (6, 3, SIDE, SIDE)
    assert drawn[:, :, -1, -1].eq(128).all()
    assert set(FAINT) == {"gray", "brown", "white", "black"}
