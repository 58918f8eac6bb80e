"""The search's quantized layers are those that `apply` writes, and its groups cost what the planner counts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open

from kit.artifact import read_manifest
from kit.ports import PartName
from kit.recipes import RECIPES, SCHEMES
from planner import flops
from quantize.apply.plan import QuantizationPlan, plan
from quantize.apply.write import FILE
from quantize.calibration import record
from quantize.products import products
from quantize.search.groups import ImageShape, find_groups
from quantize.search.simulate import Shelf, quantized_linears, round_activation


def plan_of(
    artifact: Path, recipe: str, seen: record.Record | None, part: PartName = "transformer"
) -> QuantizationPlan:
    manifest = read_manifest(artifact)
    return plan(ir.load(artifact / part / "model.onnx"), artifact / part, part, manifest, RECIPES[recipe], seen)


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int4-weights"])
def test_simulated_codes_and_scales_are_those_that_apply_writes(
    recipe: str, sample_artifact: Path, seen: record.Record, quantized_of: Callable[[str], Path]
) -> None:
    written = quantized_of(recipe)
    layers = read_manifest(written).options["layers"]["transformer"]
    with safe_open(written / "transformer" / FILE, "pt") as file:
        for change in plan_of(sample_artifact, recipe, seen).changes:
            jobs = [product.job for product in products(change, ir.DataType.FLOAT)]
            codes = torch.cat([file.get_tensor(job.codes_name).float() for job in jobs], 1)
            scales = [file.get_tensor(job.scales_name) for job in jobs]
            if change.scheme.weights == "int4":  # two codes per byte, the first in the low half
                low, high = codes.to(torch.uint8) & 0x0F, codes.to(torch.uint8) >> 4
                codes = torch.stack([low, high], -1).flatten(1).to(torch.int8)
                codes = torch.where(codes > 7, codes - 16, codes)
            made = quantized_linears(change)
            assert torch.equal(torch.cat([one.codes.float() for one in made.values()], 1), codes.float())
            for name, one in made.items():
                assert one.activation_scale == layers[name]["activation_scale"]
            found = [
                one.scales.expand(one.codes.shape[1]) if one.scales.ndim == 0 else one.scales for one in made.values()
            ]
            if change.scheme.granularity == "tensor":
                scales = [scale.expand(job.shape[0]) for scale, job in zip(scales, jobs, strict=True)]
            assert torch.equal(torch.cat(found, -1), torch.cat(scales, -1))


def test_a_simulated_layer_matches_the_artifact_in_onnx_runtime(
    sample_artifact: Path, seen: record.Record, quantized_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Covers a fused layer, smoothing by modulation and by rows, and rows that hold the factors of another site."""
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.to_out.0")
    folder = quantized_of("int8") / "transformer"
    graph = ir.load(folder / "model.onnx")
    shelf = Shelf(plan_of(sample_artifact, "int8", seen).changes)
    names: dict[str, tuple[str, str]] = {}
    for layer in layers:
        first = shelf.changes[layer].name
        quantize = next(node for node in graph.graph if node.name == f"{first}/QuantizeLinear")
        fused = next(
            (node for node in graph.graph if node.op_type == "Split" and (node.name or "").startswith(f"{first}+")),
            None,
        )
        if fused is None:
            (output,) = (n.outputs[0] for n in graph.graph if n.op_type == "MatMul" and n.name == f"{layer}/MatMul")
        else:
            output = next(value for value in fused.outputs if (value.name or "").startswith(f"{layer}/"))
        activation = quantize.inputs[0]
        assert activation is not None
        names[layer] = activation.name or "", output.name or ""
        for value in (activation, output):
            if value not in graph.graph.outputs:
                graph.graph.outputs.append(value)
    (tmp_path / FILE).hardlink_to(folder / FILE)
    ir.save(graph, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    variant = read_manifest(sample_artifact).variant
    rng = np.random.default_rng(0)
    inputs = {
        "hidden_states": rng.standard_normal((1, 16, 128), np.float32),
        "encoder_hidden_states": rng.standard_normal(
            (1, variant.text_tokens, variant.transformer.joint_dim), np.float32
        ),
        "timestep": np.array([0.5], np.float32),
        "img_ids": np.zeros((1, 16, 4), np.int64),
        "txt_ids": np.zeros((1, variant.text_tokens, 4), np.int64),
    }
    smoothed = 0
    for layer, (activation, output) in names.items():
        x, y = (torch.from_numpy(value) for value in session.run([activation, output], inputs))
        one = shelf[layer]
        smoothed += one.columns is not None
        x = x if one.columns is None else x * one.columns
        y = y if one.rows is None else y / one.rows
        ours = one.output(x)
        assert (ours - y).abs().max() < 1e-4 * y.abs().max(), f"{layer}: {(ours - y).abs().max()} of {y.abs().max()}"
    assert smoothed, "nothing was smoothed, so the test covers too little"


@pytest.mark.parametrize(("number", "kind"), [("int8", onnx.TensorProto.INT8), ("fp8", onnx.TensorProto.FLOAT8E4M3FN)])
def test_activations_are_rounded_as_onnx_runtime_rounds_them(number: Any, kind: int) -> None:
    scale = 0.37
    steps = np.arange(-1200, 1200, dtype=np.float32) / 8  # halves and quarters of a code, and beyond the last
    x = np.concatenate([steps * np.float32(scale), np.random.default_rng(0).normal(0, 60, 4000).astype(np.float32)])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    values = [
        onnx.helper.make_tensor("s", onnx.TensorProto.FLOAT, [], [scale]),
        onnx.helper.make_tensor("z", kind, [], [0]),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in ("x", "y")]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "one", ends[:1], ends[1:], values),
        opset_imports=[onnx.helper.make_opsetid("", 21)],
        ir_version=10,
    )
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": x})
    assert torch.equal(round_activation(torch.from_numpy(x), scale, number), torch.from_numpy(theirs))


def test_quantized_layers_beyond_the_limit_are_dropped(sample_artifact: Path) -> None:
    changes = plan_of(sample_artifact, "int8-weights", None).changes
    shelf = Shelf(changes, limit=1)
    for change in changes[:3]:
        assert shelf[change.name].codes.shape[0] == change.job.shape[1]
    assert list(shelf.made) == [changes[2].name]


def test_the_groups_operations_match_the_planner(sample_artifact: Path, seen: record.Record) -> None:
    variant = read_manifest(sample_artifact).variant
    image = ImageShape(image_tokens=64, steps=4, passes=2)
    for part, linears in (
        ("transformer", 4 * flops.transformer(variant.transformer, 64, variant.text_tokens).linears),
        ("text_encoder", flops.text_encoder(variant.text_encoder, variant.text_tokens).linears),
    ):
        groups = find_groups(part, variant, plan_of(sample_artifact, "fp8", seen, part), image)  # type: ignore[arg-type]
        assert sum(group.operations for group in groups) == pytest.approx(2 * linears)


def test_sparing_with_int8_weights_costs_fewer_bytes(sample_artifact: Path) -> None:
    variant, made = read_manifest(sample_artifact).variant, plan_of(sample_artifact, "int4-weights", None)
    kept, int8 = (
        sum(group.bytes for group in find_groups("transformer", variant, made, ImageShape(64, 4, 1), scheme))
        for scheme in (None, SCHEMES["int8-weights"])
    )
    weights = sum(linear.inputs * linear.outputs for change in made.changes for linear in change.linears)
    assert int8 == weights // 2
    assert kept in (weights * 2 - weights // 2, weights * 4 - weights // 2)  # stored in bf16 or fp32
