"""The quantized sample gives images close to those in fp32, and runs in integer kernels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from kit.ports import PartName
from quantize import prompt_set
from quantize.gate.drawing import Canvas, open_generator
from quantize.gate.similarity import Pixels, psnr

QuantizedOf = Callable[[str], Path]
PROMPTS = prompt_set.load("sample:3:5").prompts
FUSED = ("MatMulIntegerToFloat", "QLinearMatMul", "DynamicQuantizeMatMul")


def images(artifact: Path) -> list[Pixels]:
    generate = open_generator(artifact, Canvas())
    return [generate(prompt.text, seed).pixels for seed, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def reference(sample_artifact: Path) -> list[Pixels]:
    return images(sample_artifact)


@pytest.mark.parametrize(
    ("recipe", "decibels"), [("int8", 42.0), ("fp8", 39.0), ("int8-weights", 42.0), ("int4-weights", 24.0)]
)
def test_images_stay_close_to_those_in_fp32(
    quantized_of: QuantizedOf, reference: list[Pixels], recipe: str, decibels: float
) -> None:
    found = [psnr(before, after) for before, after in zip(reference, images(quantized_of(recipe)), strict=True)]
    assert np.mean(found) >= decibels, f"{recipe}: {found}"
    assert max(found) < 99  # something was quantized


def optimized(graph: Path, folder: Path) -> onnx.GraphProto:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx", load_external_data=False).graph


@pytest.mark.parametrize(("part", "products"), [("transformer", 24), ("text_encoder", 27 * 4)])
def test_every_int8_product_runs_in_an_integer_kernel(
    quantized_of: QuantizedOf, tmp_path: Path, part: PartName, products: int
) -> None:
    """The 27 text encoder layers have q/k/v, o and gate/up in int8; down has only its weights in int8."""
    graph = optimized(quantized_of("int8") / part / "model.onnx", tmp_path)
    made = {output: node for node in graph.node for output in node.output}
    fused = [node for node in graph.node if node.op_type in FUSED]
    left = [
        node
        for node in graph.node
        if node.op_type in ("MatMul", "FusedMatMul", "Gemm")
        and any(made[name].op_type == "DequantizeLinear" for name in node.input if name in made)
    ]
    down = [node for node in left if "down_proj" in node.name]
    spared = 0 if part == "transformer" else 27
    assert len(fused) == products - spared, f"{len(fused)} fused; left: {[node.name for node in left][:5]}"
    assert len(left) == len(down)
