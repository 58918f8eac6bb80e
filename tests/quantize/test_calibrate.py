"""Calibration runs the exported modules, with real weights, over prompts and steps of every family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.torch_part import TorchPart, bind, load
from kit import tiny
from kit.checkpoint import resolve
from kit.configs import read_variant
from kit.engine import Array
from kit.errors import CheckFailed, UsageError
from kit.ports import PartName
from kit.variants import Family, Variant
from quantize import prompt_set
from quantize.calibration import record
from quantize.calibration.calibrate import Calibration, calibrate
from quantize.prompt_set import Prompt, PromptSet
from quantize.sites import sites
from runtimes.ort.engine import OrtEngine

TOKENS = 16  # of an image of 64 x 64


def prompts(*texts: str) -> PromptSet:
    return PromptSet("test", tuple(Prompt(f"p{i}", "test", text) for i, text in enumerate(texts)))


def config(*texts: str, steps: int = 2, parts: tuple[PartName, ...] = ("transformer",)) -> Calibration:
    return Calibration(prompts(*texts), steps=steps, width=64, height=64, parts=parts)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("calibrate") / "klein", tiny.Tiny(text_tokens=64))


def linears_of(variant: Variant, part: PartName) -> set[str]:
    return {reader for site in sites(part, variant) for reader in site.readers}


@pytest.mark.parametrize(
    ("family", "passes"), [("klein", 1), ("klein-base", 2), ("dev", 1)], ids=["klein", "klein-base", "dev"]
)
def test_every_linear_layer_is_observed_for_every_prompt_and_step(
    checkpoint_of: Callable[[Family], Path], family: Family, passes: int
) -> None:
    checkpoint = checkpoint_of(family)
    made = calibrate(checkpoint, config("a red fox", parts=("text_encoder", "transformer")))
    variant = read_variant(checkpoint)
    image, text = made.parts["transformer"], made.parts["text_encoder"]
    assert set(image) == linears_of(variant, "transformer")
    assert set(text) == linears_of(variant, "text_encoder")
    steps = 2 * passes
    assert image["transformer_blocks.0.attn.to_q"].rows == steps * TOKENS
    assert image["transformer_blocks.0.attn.add_q_proj"].rows == steps * variant.text_tokens
    assert image["single_transformer_blocks.0.attn.to_out"].rows == steps * (TOKENS + variant.text_tokens)
    assert text["layers.3.mlp.up_proj"].rows == passes * variant.text_tokens  # two texts with classifier-free guidance
    assert len(image["transformer_blocks.1.ff.linear_in"].amax_by_step) == 2
    assert min(min(seen.amax_by_step) for seen in image.values()) > 0
    (run,) = made.runs
    assert (made.variant, run["steps"], run["seeds"]) == (variant.name, 2, [0])
    assert (run["prompts"]["count"], run["width"]) == (1, 64)
    assert run["versions"]["torch"]


def test_merged_records_are_the_record_of_both_prompt_sets(klein: Path) -> None:
    parts: tuple[PartName, ...] = ("text_encoder", "transformer")
    each = [calibrate(klein, config(text, steps=1, parts=parts)) for text in ("a red fox", "two boats on a lake")]
    both = calibrate(klein, config("a red fox", "two boats on a lake", steps=1, parts=parts))
    merged = record.merge(each)
    for part in parts:
        assert merged.parts[part].keys() == both.parts[part].keys()
        for name, seen in both.parts[part].items():
            found = merged.parts[part][name]
            assert (found.rows, found.amax, found.amax_by_step) == (seen.rows, seen.amax, seen.amax_by_step), name
            assert (found.histogram, found.weight) == (seen.histogram, seen.weight), name
            assert np.array_equal(found.channel_amax, seen.channel_amax), name
            assert found.channel_square == pytest.approx(seen.channel_square, rel=1e-5), name


def test_requests_in_one_batch_give_the_statistics_of_single_requests(klein: Path) -> None:
    alone = config("a red fox", "two boats on a lake", "x", steps=1)
    one, two = (calibrate(klein, replace(alone, batch=batch)).parts["transformer"] for batch in (1, 2))
    for name, seen in one.items():
        assert two[name].rows == seen.rows
        assert two[name].amax == pytest.approx(seen.amax, rel=1e-4)


@pytest.mark.parametrize("part", ["text_encoder", "transformer"])
def test_a_part_in_torch_is_the_exported_graph(sample_artifact: Path, part: PartName) -> None:
    from kit.artifact import read_manifest

    manifest, checkpoint = read_manifest(sample_artifact), resolve("sample")
    torch_part = load(part, manifest.variant, bind(part, manifest.variant, checkpoint), "fp32")
    place = manifest.part(part)
    engine = OrtEngine(sample_artifact / place.graph, place.ports, threads=1)
    random = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for port in torch_part.ports.inputs:
        shape = port.shape({"batch": 2, "image_tokens": 16})
        whole = port.dtype == "i64"
        inputs[port.name] = random.integers(0, 9, shape) if whole else random.random(shape, dtype=np.float32)
    if part == "text_encoder":
        mask = np.ones_like(inputs["attention_mask"])
        mask[1, 20:] = 0
        inputs["attention_mask"] = mask
    (ours,), (theirs,) = torch_part.run(inputs).values(), engine.run(inputs).values()
    difference = np.abs(ours.astype(np.float32) - theirs.astype(np.float32)) / np.abs(theirs.astype(np.float32)).max()
    assert difference.max() <= 1e-4, f"max {difference.max():.2e}, mean {difference.mean():.2e} of the scale"


def test_an_overflow_is_rejected_with_the_step(klein: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflow(self: TorchPart, inputs: dict[str, Array]) -> dict[str, Array]:
        return {"velocity": np.full_like(inputs["hidden_states"], np.inf)}

    encode = TorchPart.run

    def run(self: TorchPart, inputs: dict[str, Array]) -> dict[str, Array]:
        return overflow(self, inputs) if "hidden_states" in inputs else encode(self, inputs)

    monkeypatch.setattr(TorchPart, "run", run)
    with pytest.raises(CheckFailed, match="produced values that are not finite; calibrate with --dtype bf16 or fp32"):
        calibrate(klein, config("a red fox"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": PromptSet("empty.txt", ())}, r"--prompts empty\.txt: contains no prompts"),
        ({"parts": ("vae_decoder",)}, "--parts: vae_decoder cannot be calibrated; text_encoder, transformer can"),
        ({"parts": ()}, "--parts: nothing cannot be calibrated"),
        ({"device": "cuda:7"}, "--device cuda:7: torch finds no CUDA GPU here; use --device cpu"),
        ({"offload": "layers"}, "--offload layers requires a GPU; on a CPU weights are paged in from their files"),
        ({"width": 65}, "width: 65 is no"),
        ({"steps": 0}, "steps: 0 is"),
        ({"prompts": prompts("a fox " * 40)}, "prompt 'a fox a fox a fox .*: .* tokens .* the limit is 64, shorten"),
    ],
)
def test_what_cannot_be_calibrated_is_rejected(
    klein: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UsageError, match=message):
        calibrate(klein, replace(config("a red fox"), **change))


def test_the_kits_prompts_are_at_least_128() -> None:
    assert len(prompt_set.load("kit").prompts) >= 128
