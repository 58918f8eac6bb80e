"""What cannot be quantized is rejected before anything is written, with an error that names the remedy."""

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
from kit.recipes import RECIPES, Recipe, Rule
from kit.safetensors_file import read_header
from quantize.apply.apply import apply
from quantize.apply.plan import check_recipe
from quantize.calibration import record
from quantize.calibration.record import Record, Seen

LAYER = "single_transformer_blocks.3.attn.to_out"


def changed(made: Record, change: Callable[[Seen], Seen | None]) -> Record:
    """Change the statistics of one layer in a record; None removes the layer."""
    layers = dict(made.parts["transformer"])
    seen = change(layers.pop(LAYER))
    if seen is not None:
        layers[LAYER] = seen
    return replace(made, parts={**made.parts, "transformer": layers})


def with_channels(seen: Seen, value: float) -> Seen:
    channels = seen.channel_amax.copy()
    channels[5] = value
    return replace(seen, channel_amax=channels)


def assert_rejected(artifact: Path, folder: Path, recipe: Recipe, message: str, **given: Any) -> None:
    with pytest.raises(UsageError, match=message):
        apply(artifact, folder / "out", recipe, **given)
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda seen: replace(seen, weight="0123456789abcdef"),
            rf"the calibration record belongs to another checkpoint: {LAYER} in the transformer has different weights; "
            r"calibrate the checkpoint that was exported, with the same --lora",
        ),
        (lambda seen: None, rf"has no entry for {LAYER} in the transformer; calibrate again with --parts transformer"),
        (
            lambda seen: replace(seen, amax=float("nan")),
            rf"the calibration record: the input of {LAYER} has a value that is not finite \(amax nan\); "
            r".* again with --dtype bf16",
        ),
        (lambda seen: with_channels(seen, float("inf")), rf"the input of {LAYER} has a value that is not finite"),
        (lambda seen: with_channels(seen, float("nan")), rf"the input of {LAYER} has a value that is not finite"),
        (
            lambda seen: replace(seen, amax=0.0),
            rf"the input of {LAYER} was always zero \(amax 0.0\), so it has no scale; "
            r"calibrate with more prompts, or keep",
        ),
        (
            lambda seen: replace(seen, channel_amax=seen.channel_amax[:-1], channel_square=seen.channel_square[:-1]),
            rf"is malformed: {LAYER} in the transformer has 767 channels, its weight has 768; calibrate again",
        ),
    ],
)
@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_a_record_that_does_not_fit_is_rejected(
    sample_artifact: Path,
    sample_record: Path,
    tmp_path: Path,
    recipe: str,
    change: Callable[[Seen], Seen | None],
    message: str,
) -> None:
    made = changed(record.read(sample_record), change)
    assert_rejected(sample_artifact, tmp_path, RECIPES[recipe], message, record=made)


@pytest.mark.parametrize("recipe", ["int8", "int8-plain", "fp8"])
def test_activations_need_a_calibration(sample_artifact: Path, tmp_path: Path, recipe: str) -> None:
    message = (
        rf"recipe {recipe} quantizes activations, which needs a calibration record: run `python -m quantize calibrate "
        r"CHECKPOINT --prompts kit --out cal\.json` and add --calibration cal\.json"
    )
    assert_rejected(sample_artifact, tmp_path, RECIPES[recipe], message)


@pytest.mark.parametrize("name", ["a10g", "a100-80g"])
def test_fp8_is_rejected_for_a_gpu_without_it(
    sample_artifact: Path, sample_record: Path, tmp_path: Path, name: str
) -> None:
    message = rf"fp8 needs compute capability 8\.9 or newer; {name}.* has 8\.\d: use --recipe int8"
    made = record.read(sample_record)
    assert_rejected(sample_artifact, tmp_path, RECIPES["fp8"], message, record=made, gpu=gpu(name))


def test_int8_is_accepted_for_a_gpu_without_fp8(sample_artifact: Path, sample_record: Path) -> None:
    made = record.read(sample_record)
    check_recipe(read_manifest(sample_artifact), RECIPES["int8"], made, gpu("a10g"))
    check_recipe(read_manifest(sample_artifact), RECIPES["fp8"], made, gpu("l4"))


def test_a_quantized_artifact_is_not_quantized_again(quantized_of: Callable[[str], Path], tmp_path: Path) -> None:
    message = r"is an artifact of kind 'quantized'; expected onnx"
    assert_rejected(quantized_of("int8-weights"), tmp_path, RECIPES["int8-weights"], message)


def test_a_recipe_of_another_compute_type_is_rejected(sample_artifact: Path, tmp_path: Path) -> None:
    message = "recipe bf16 changes no weight, and the artifact computes in fp32: export it with --dtype bf16"
    assert_rejected(sample_artifact, tmp_path, RECIPES["bf16"], message)


def test_a_rule_that_matches_no_layer_is_rejected(sample_artifact: Path, tmp_path: Path) -> None:
    rule = Rule("transformer", "transformer_block.*", "keep")
    recipe = replace(RECIPES["int8-weights"], name="mine", rules=(rule, *RECIPES["int8-weights"].rules))
    message = (
        r"recipe mine: 'transformer_block\.\*' matches no linear layer of the transformer that can be quantized; "
        r"these can be, for example: context_embedder, x_embedder, transformer_blocks\.0\.attn\.add_q_proj"
    )
    assert_rejected(sample_artifact, tmp_path, recipe, message)


def test_an_artifact_is_not_quantized_into_itself(sample_artifact: Path) -> None:
    with pytest.raises(UsageError, match=r"--out .* is the input .*; choose another --out"):
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


def test_weights_that_are_not_finite_are_rejected_by_name_and_leave_nothing(own: Path, tmp_path: Path) -> None:
    poke(own, 0x7FC0)
    with pytest.raises(ArtifactError, match=r"\.safetensors: tensor '\S+to_out\.weight' contains NaN or infinity; it"):
        apply(own, tmp_path / "out", RECIPES["int8-weights"])
    assert [path.name for path in tmp_path.iterdir()] == ["own"]


def test_an_artifact_is_made_again_when_a_value_of_its_source_changed(own: Path, tmp_path: Path) -> None:
    """The digest of a weight file covers only its header, so other values can have the same manifest."""
    assert not apply(own, tmp_path / "out", RECIPES["int8-weights"]).up_to_date
    assert apply(own, tmp_path / "out", RECIPES["int8-weights"]).up_to_date
    poke(own, 0x3F80)
    assert not apply(own, tmp_path / "out", RECIPES["int8-weights"]).up_to_date
