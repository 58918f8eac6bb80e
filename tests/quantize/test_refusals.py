"""What cannot be quantized is refused before anything is written, with a sentence that says what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.artifact import read_manifest
from kit.errors import ArtifactError, UsageError
from kit.gpus import gpu
from kit.safetensors_file import read_header
from quantize.apply.apply import apply, check_recipe
from quantize.calibration import record
from quantize.calibration.record import Record, Seen
from quantize.recipes import RECIPES, Recipe, Rule

LAYER = "single_transformer_blocks.3.attn.to_out"


def changed(made: Record, change: Callable[[Seen], Seen | None]) -> Record:
    """Change what a record says of one layer; None takes the layer out."""
    layers = dict(made.parts["transformer"])
    seen = change(layers.pop(LAYER))
    if seen is not None:
        layers[LAYER] = seen
    return replace(made, parts={**made.parts, "transformer": layers})


def with_channels(seen: Seen, value: float) -> Seen:
    channels = seen.channel_amax.copy()
    channels[5] = value
    return replace(seen, channel_amax=channels)


def refuse(artifact: Path, folder: Path, recipe: Recipe, message: str, **given: Any) -> None:
    with pytest.raises(UsageError, match=message):
        apply(artifact, folder / "out", recipe, **given)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda seen: replace(seen, weight="0123456789abcdef"),
            rf"the calibration record is of another checkpoint: {LAYER} in the transformer has other weights; "
            r"calibrate the checkpoint that was exported, with the same --lora",
        ),
        (lambda seen: None, rf"says nothing of {LAYER} in the transformer; calibrate again with --parts transformer"),
        (
            lambda seen: replace(seen, amax=float("nan")),
            rf"the calibration record: {LAYER} saw a value that is not finite \(amax nan\); .* again with --dtype bf16",
        ),
        (lambda seen: with_channels(seen, float("inf")), rf"{LAYER} saw a value that is not finite"),
        (lambda seen: with_channels(seen, float("nan")), rf"{LAYER} saw a value that is not finite"),
        (
            lambda seen: replace(seen, amax=0.0),
            rf"{LAYER} saw nothing but zeros \(amax 0.0\), which gives no scale; calibrate with more prompts, or keep",
        ),
        (
            lambda seen: replace(seen, channel_amax=seen.channel_amax[:-1], channel_square=seen.channel_square[:-1]),
            rf"is malformed: {LAYER} in the transformer has 767 channels, its weight has 768; calibrate again",
        ),
    ],
)
@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_a_record_that_does_not_fit_is_refused(
    sample_artifact: Path,
    sample_record: Path,
    tmp_path: Path,
    recipe: str,
    change: Callable[[Seen], Seen | None],
    message: str,
) -> None:
    made = changed(record.read(sample_record), change)
    refuse(sample_artifact, tmp_path, RECIPES[recipe], message, record=made)


@pytest.mark.parametrize("recipe", ["int8", "int8-plain", "fp8"])
def test_activations_need_a_calibration(sample_artifact: Path, tmp_path: Path, recipe: str) -> None:
    message = (
        rf"recipe {recipe} quantizes activations, which needs a calibration record: run `python -m quantize calibrate "
        r"CHECKPOINT --prompts kit --out cal\.json` and add --calibration cal\.json"
    )
    refuse(sample_artifact, tmp_path, RECIPES[recipe], message)


@pytest.mark.parametrize("name", ["a10g", "a100-80g"])
def test_fp8_is_refused_for_a_gpu_that_has_none(
    sample_artifact: Path, sample_record: Path, tmp_path: Path, name: str
) -> None:
    message = rf"fp8 needs compute capability 8\.9 or newer; {name}.* has 8\.\d: use --recipe int8"
    made = record.read(sample_record)
    refuse(sample_artifact, tmp_path, RECIPES["fp8"], message, record=made, gpu=gpu(name))


def test_int8_is_taken_for_the_gpu_that_has_no_fp8(sample_artifact: Path, sample_record: Path) -> None:
    made = record.read(sample_record)
    check_recipe(read_manifest(sample_artifact), RECIPES["int8"], made, gpu("a10g"))
    check_recipe(read_manifest(sample_artifact), RECIPES["fp8"], made, gpu("l4"))


def test_a_quantized_artifact_is_not_quantized_again(quantized_of: Callable[[str], Path], tmp_path: Path) -> None:
    message = r"is an artifact of kind 'quantized'; expected onnx"
    refuse(quantized_of("int8-weights"), tmp_path, RECIPES["int8-weights"], message)


def test_a_recipe_of_another_compute_type_is_refused(sample_artifact: Path, tmp_path: Path) -> None:
    message = "recipe bf16 changes no weight, and the artifact computes in fp32: export it with --dtype bf16"
    refuse(sample_artifact, tmp_path, RECIPES["bf16"], message)


def test_a_rule_that_names_no_layer_is_refused(sample_artifact: Path, tmp_path: Path) -> None:
    rule = Rule("transformer", "transformer_block.*", "keep")
    recipe = replace(RECIPES["int8-weights"], name="mine", rules=(rule, *RECIPES["int8-weights"].rules))
    message = (
        r"recipe mine: 'transformer_block\.\*' names no linear layer of the transformer that can be quantized; "
        r"such are context_embedder, x_embedder, transformer_blocks\.0\.attn\.add_q_proj"
    )
    refuse(sample_artifact, tmp_path, recipe, message)


def test_an_artifact_is_not_quantized_into_itself(sample_artifact: Path) -> None:
    with pytest.raises(UsageError, match=r"--out .* is the artifact that is to be quantized; choose another folder"):
        apply(sample_artifact, sample_artifact, RECIPES["int8-weights"])
    assert (sample_artifact / "manifest.json").is_file()


@pytest.fixture
def own(sample_artifact: Path, tmp_path: Path) -> Path:
    """Copy the artifact, so that its weights can be changed."""
    return Path(shutil.copytree(sample_artifact, tmp_path / "own"))


def poke(artifact: Path, value: int) -> None:
    """Write one bf16 value into the last row of a weight."""
    (file,) = (artifact / "transformer").glob("*.safetensors")
    place = read_header(file)[f"{LAYER}.weight"]
    content = bytearray(file.read_bytes())
    content[place.offset + place.nbytes - 2 : place.offset + place.nbytes] = np.array([value], "<u2").tobytes()
    file.write_bytes(content)


def test_weights_that_are_not_finite_are_refused_by_name_and_leave_nothing(own: Path, tmp_path: Path) -> None:
    poke(own, 0x7FC0)
    with pytest.raises(ArtifactError, match=r"\.safetensors: tensor '\S+to_out\.weight' holds NaN or an infinity; it"):
        apply(own, tmp_path / "out", RECIPES["int8-weights"])
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_an_artifact_is_made_again_when_a_value_of_its_source_changed(own: Path, tmp_path: Path) -> None:
    """A digest of weights covers their header alone, so the same manifest may stand beside other values."""
    assert not apply(own, tmp_path / "out", RECIPES["int8-weights"]).up_to_date
    assert apply(own, tmp_path / "out", RECIPES["int8-weights"]).up_to_date
    poke(own, 0x3F80)
    assert not apply(own, tmp_path / "out", RECIPES["int8-weights"]).up_to_date
