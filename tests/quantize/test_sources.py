"""Every source that can be exported can be quantized: single files in FP8, merged adapters, weights in bf16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.artifact import ExportConfig, export
from export.lora.terms import Lora
from kit import tiny
from kit.artifact import verify
from kit.errors import UsageError
from kit.recipes import RECIPES
from quantize.apply.apply import apply
from quantize.apply.write import FILE
from quantize.calibration.calibrate import Calibration, calibrate
from quantize.calibration.record import Record
from quantize.prompt_set import Prompt, PromptSet
from tests.export.bfl import to_bfl, to_diffusers
from tests.export.test_single_file import dequantized, fp8, load

LAYER = "transformer_blocks.1.ff.linear_in"
PROMPTS = PromptSet("test", (Prompt("p", "test", "a red fox"),))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("sources") / "klein", tiny.Tiny(text_tokens=64))


def calibrated(checkpoint: Path, *loras: Lora, single_file: Path | None = None) -> Record:
    files = {"transformer": single_file} if single_file else {}
    config = Calibration(PROMPTS, steps=1, width=64, height=64, parts=("transformer",), loras=loras, single_files=files)
    return calibrate(checkpoint, config)


def restored(artifact: Path, layer: str) -> torch.Tensor:
    """Return the weight that codes and scales of a layer represent, [N, K]."""
    tensors = load_file(artifact / "transformer" / FILE)
    (codes,) = (tensor for name, tensor in tensors.items() if name.startswith(layer) and name.endswith((".int8",)))
    (scale,) = (tensor for name, tensor in tensors.items() if name.startswith(layer) and name.endswith(".scale"))
    values: torch.Tensor = codes * scale
    return values.mT


def test_a_single_file_in_fp8_is_quantized_from_the_values_it_represents(checkpoint: Path, tmp_path: Path) -> None:
    quantized = fp8(to_bfl(load(checkpoint)))
    save_file(quantized, tmp_path / "flux2-fp8.safetensors")
    config = ExportConfig(("transformer",), single_files={"transformer": tmp_path / "flux2-fp8.safetensors"})
    export(checkpoint, tmp_path / "onnx", config)
    made = calibrated(checkpoint, single_file=tmp_path / "flux2-fp8.safetensors")
    apply(tmp_path / "onnx", tmp_path / "out", RECIPES["int8-plain"], made)
    weight = to_diffusers(dequantized(quantized))[f"{LAYER}.weight"]
    found = restored(tmp_path / "out", LAYER)
    step = weight.abs().amax(1, keepdim=True) / 127
    assert ((found - weight).abs() <= step * 0.5001).all()
    model = ir.load(tmp_path / "out" / "transformer" / "model.onnx")
    stored = [value.dtype for value in model.graph.initializers.values()]
    assert ir.DataType.FLOAT8E4M3FN not in stored  # neither the source's weights nor their Q/DQ remain
    assert verify(tmp_path / "out").kind == "quantized"


def test_a_merged_adapter_needs_a_record_with_the_same_adapter(checkpoint: Path, tmp_path: Path) -> None:
    weight = load(checkpoint)[f"{LAYER}.weight"]
    random = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, weight.shape[1], generator=random), torch.randn(weight.shape[0], 2, generator=random)
    names = f"transformer.{LAYER}.lora_A.weight", f"transformer.{LAYER}.lora_B.weight"
    save_file(dict(zip(names, (a, b), strict=True)), tmp_path / "style.safetensors")
    lora = Lora(tmp_path / "style.safetensors", 0.5)
    export(checkpoint, tmp_path / "onnx", ExportConfig(("transformer",), loras=(lora,)))
    with pytest.raises(
        UsageError,
        match=rf"belongs to another checkpoint: {LAYER} in the .*, with the same --lora",
    ):
        apply(tmp_path / "onnx", tmp_path / "out", RECIPES["fp8"], calibrated(checkpoint))
    assert not (tmp_path / "out").exists()
    made = calibrated(checkpoint, lora)
    assert made.runs[0]["loras"][0]["file"] == "style.safetensors"
    apply(tmp_path / "onnx", tmp_path / "out", RECIPES["int8-plain"], made)
    merged = weight + 0.5 * b @ a
    step = merged.abs().amax(1, keepdim=True) / 127
    assert ((restored(tmp_path / "out", LAYER) - merged).abs() <= step * 0.75).all()  # scales are rounded to bf16


def test_the_manifest_records_source_recipe_and_calibration(
    quantized_of: object, sample_artifact: Path, sample_record: Path
) -> None:
    from kit.artifact import digest
    from quantize.calibration import record

    assert callable(quantized_of)
    manifest = verify(quantized_of("int8"), ("quantized",))
    assert (manifest.recipe, manifest.compute) == ("int8", "fp32")
    assert manifest.source["parent"] == digest(sample_artifact / "manifest.json")
    assert manifest.source["calibration"] == record.read(sample_record).digest
    layers = manifest.options["layers"]["transformer"]
    assert layers[LAYER]["scheme"] == "int8"
    assert layers[LAYER]["activation_scale"] > 0
    assert manifest.options["layers"]["text_encoder"]["layers.0.mlp.down_proj"] == {
        "scheme": "int8-weights",
        "activation_scale": None,
    }
    smoothing = manifest.options["smoothing"]
    assert {entry["expected_gain"] >= 1 for entry in smoothing.values()} == {True}
    assert np.isfinite([entry["expected_gain"] for entry in smoothing.values()]).all()
