"""The gate's measures against values computed by hand, and the reasons for those that are not available."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kit.errors import UsageError
from quantize.gate import learned, similarity
from quantize.gate.drawing import Drawing
from quantize.gate.judging import judge_measure, judged
from quantize.gate.measures import Scope, available
from quantize.gate.metrics import METRICS
from quantize.prompt_set import Prompt, load


def flat(level: int, side: int = 32) -> similarity.Pixels:
    return np.full((side, side, 3), level, np.uint8)


def drawing(pixels: similarity.Pixels) -> Drawing:
    return Drawing(pixels, np.ones((2, 4), np.float32))


def test_psnr_of_images_that_are_off_by_one_everywhere_is_48_13_db() -> None:
    assert similarity.psnr(flat(100), flat(101)) == pytest.approx(20 * np.log10(255), abs=1e-9)


def test_psnr_of_equal_images_is_100_db() -> None:
    assert similarity.psnr(flat(7), flat(7)) == similarity.MOST_DB


def test_ssim_of_flat_images_matches_the_formula() -> None:
    """Without variance only the luminance term is left: (2ab + c) / (a^2 + b^2 + c) with c = (0.01 * 255)^2."""
    c = (0.01 * 255) ** 2
    assert similarity.ssim(flat(100), flat(150)) == pytest.approx((2 * 100 * 150 + c) / (100**2 + 150**2 + c), abs=1e-6)
    assert similarity.ssim(flat(100), flat(100)) == 1


def test_flip_is_zero_for_equal_images_and_almost_one_from_black_to_white() -> None:
    assert similarity.flip(flat(90), flat(90)) == 0
    assert 0.9 < similarity.flip(flat(0), flat(255)) <= 1


def test_flips_map_is_dark_where_nothing_differs_and_bright_where_something_does() -> None:
    changed = flat(255, 64)
    changed[:, :16] = 0
    drawn = similarity.flip_map(flat(255, 64), changed).astype(int).sum(axis=2)
    assert drawn[:, 40:].max() < 10
    assert drawn[:, 4:12].min() > 300


def test_the_cosine_is_computed_at_every_step() -> None:
    reference, candidate = np.array([[1.0, 0], [1, 0], [3, 4]]), np.array([[2.0, 0], [0, 1], [4, 3]])
    assert similarity.cosines(reference, candidate) == pytest.approx([1, 0, 24 / 25])


WORDED = Prompt("a", "x", "a red circle on a white background, with the word HELLO", "HELLO", "latin")


def test_the_judge_counts_the_facts_of_a_true_drawing_and_of_a_wrong_one() -> None:
    import random

    from kit.sample.draw import draw
    from kit.sample.world import Scene, Thing

    scene = Scene((Thing("circle", "red"), Thing("square", "blue")), "left of", "white", "HELLO")
    true = draw(scene, random.Random(1), "filled")
    assert judged(scene.prompt(), true) == (1.0, True)
    wrong_word = Scene(scene.things, scene.layout, scene.background, "WORLD")
    assert judged(wrong_word.prompt(), true) == (9 / 10, False)
    measure = judge_measure([WORDED], 128, 128)
    assert not isinstance(measure, str)
    prompt = Prompt("a", "x", scene.prompt())
    change = measure(prompt, drawing(true), drawing(np.full_like(true, 250)))
    assert change["judge_change"].value < -0.5
    assert change["judge_exact_change"].value == -1


def test_the_judge_gives_a_reason_for_what_it_cannot_judge() -> None:
    assert "of 128 x 128 pixels, not 64 x 64" in str(judge_measure([WORDED], 64, 64))
    assert "prompt b is not in it" in str(judge_measure([WORDED, Prompt("b", "x", "a sign")], 128, 128))


def test_every_metric_is_measured_or_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    prompt = load("sample:1").prompts[0]
    measures, reasons = available(Scope([prompt], 128, 128))
    image = np.random.default_rng(0).integers(0, 255, (128, 128, 3), np.uint8)
    found = {name for measure in measures for name in measure(prompt, drawing(image), drawing(image))}
    assert found | reasons.keys() == METRICS.keys()
    assert not found & reasons.keys()
    assert reasons["clip_change"] == "no CLIP model was given with --clip DIR"


def test_lpips_uses_the_package_and_the_weights_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Network:
        def __init__(self, **options: Any) -> None:
            assert options == {"net": "alex", "version": "0.1", "verbose": False}

        def eval(self) -> Network:
            return self

        def __call__(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            assert first.shape == (1, 3, 32, 32)
            assert float(first.min()) == -1
            assert float(second.max()) == 1
            return (first - second).abs().mean().reshape(1, 1, 1, 1)

    package = types.ModuleType("lpips")
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    package.LPIPS = Network  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert learned.lpips_measure() == f"AlexNet's weights, {learned.ALEXNET}, are not in torch's cache"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / learned.ALEXNET).touch()
    measure = learned.lpips_measure()
    assert not isinstance(measure, str)
    assert measure(WORDED, drawing(flat(0)), drawing(flat(255)))["lpips"].value == 2


def test_without_the_package_lpips_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    monkeypatch.setattr(learned.importlib.util, "find_spec", lambda _: None)  # type: ignore[attr-defined]
    assert learned.lpips_measure() == "the package lpips is not installed"


def test_a_package_that_cannot_be_imported_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lpips.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / learned.ALEXNET).touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert learned.lpips_measure() == (
        "the package lpips cannot be imported (operator torchvision::nms does not exist)"
    )


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny CLIP model with random weights."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("clip")
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {word: number for number, word in enumerate(("<bos>", "<eos>", "<unk>", "a", "red", "circle"))}
    config: Any = transformers.CLIPConfig(
        text_config=text | {"vocab_size": len(words), "bos_token_id": 0, "eos_token_id": 1},
        vision_config=text | {"image_size": 32, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer: Any = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast: Any = transformers.PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, unk_token="<unk>", model_max_length=16).save_pretrained(folder)
    processor: Any = transformers.CLIPImageProcessorPil
    processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_the_clip_score_is_the_cosine_of_image_and_prompt(tiny_clip: Path) -> None:
    measure = learned.clip_measure(tiny_clip)
    assert not isinstance(measure, str)
    image = np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8)
    same = measure(WORDED, drawing(image), drawing(image))["clip_change"]
    assert same.value == pytest.approx(0, abs=1e-4)
    other = measure(WORDED, drawing(image), drawing(np.bitwise_not(image)))["clip_change"]
    assert other.value != 0
    assert other.levels is not None
    assert all(0 <= level <= 100 for level in other.levels)


def test_a_folder_without_a_clip_model_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="config.json is missing; a CLIP model in transformers' layout is needed"):
        learned.clip_measure(tmp_path)
