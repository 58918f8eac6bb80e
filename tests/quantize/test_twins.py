"""The fp32 and the bf16 form of a quantized artifact: the same weights, graphs that differ only in the compute type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file

from export.artifact import ExportConfig, export
from export.lint.lint import lint
from kit.checkpoint import resolve
from kit.recipes import find_recipe
from quantize.apply.apply import apply
from quantize.apply.write import FILE
from quantize.calibration import record

QuantizedOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def bf16_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the sample's transformer for TensorRT."""
    out = tmp_path_factory.mktemp("bf16") / "sample"
    export(resolve("sample"), out, ExportConfig(("transformer",), dtype="bf16"))
    return out


@pytest.fixture(params=["int8", "fp8"], scope="module")
def twins(
    request: pytest.FixtureRequest, quantized_of: QuantizedOf, bf16_artifact: Path, sample_record: Path
) -> tuple[Path, Path]:
    out = bf16_artifact.with_name(request.param)
    apply(bf16_artifact, out, find_recipe(request.param), record.read(sample_record))
    return quantized_of(request.param), out


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else value


def described(folder: Path, compute: ir.DataType) -> dict[str, Any]:
    """Describe the nodes of quantization and products, by name, with a placeholder for the compute type."""
    model = ir.load(folder / "transformer" / "model.onnx")
    told = {}
    for node in model.graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "MatMul", "Split", "Softmax", "Mul"):
            continue
        if node.op_type in ("Split", "Mul") and "/Mul_scale_" not in node.name:
            continue  # of the graph itself, which is not the same in both types
        attributes = {name: plain(attribute.value) for name, attribute in node.attributes.items()}
        if "output_dtype" in attributes:
            assert attributes["output_dtype"] == compute
            attributes["output_dtype"] = "compute type"
        told[node.name] = (node.op_type, attributes, len(node.inputs), [str(output.shape) for output in node.outputs])
    return told


def quantizing(folder: Path) -> dict[str, bytes]:
    """Return scales, zero points and split sizes of the graph, and the byte ranges of its weights."""
    graph = onnx.load(folder / "transformer" / "model.onnx", load_external_data=False).graph
    return {
        tensor.name: tensor.SerializeToString()
        for tensor in graph.initializer
        if tensor.external_data or "scale" in tensor.name or "zero_point" in tensor.name or "split" in tensor.name
    }


def test_the_weight_files_of_twins_are_equal_byte_by_byte(twins: tuple[Path, Path]) -> None:
    fp32, bf16 = ((folder / "transformer" / FILE).read_bytes() for folder in twins)
    assert len(fp32) > 4_000_000
    assert fp32 == bf16


def test_scales_and_places_of_twins_are_equal_byte_by_byte(twins: tuple[Path, Path]) -> None:
    fp32, bf16 = (quantizing(folder) for folder in twins)
    assert len(fp32) > 60
    assert all(bf16[name] == content for name, content in fp32.items() if name in bf16)
    alone = {name for name in fp32.keys() ^ bf16.keys() if ".scale" not in name and "split_sizes" not in name}
    assert alone <= {"unit_scale"}


def test_the_nodes_of_twins_differ_only_in_the_compute_type_and_in_scales_per_channel(
    twins: tuple[Path, Path],
) -> None:
    fp32 = described(twins[0], ir.DataType.FLOAT)
    bf16 = described(twins[1], ir.DataType.BFLOAT16)
    fp8 = twins[1].name == "fp8"
    assert sum(op == "DequantizeLinear" for op, *_ in fp32.values()) == 2 * 24
    changed = set() if fp8 else {name for name in {*fp32, *bf16} if "Mul_scale" in name or "Split" in name}
    assert fp32.keys() - changed == bf16.keys() - changed
    for name in fp32.keys() - changed:
        if not fp8 and name.endswith("DequantizeLinear_weight"):
            assert fp32[name][1] == {**bf16[name][1], "axis": 1}
        else:
            assert fp32[name] == bf16[name]


def test_channel_scales_of_the_bf16_twin_multiply_every_output_once(bf16_artifact: Path, sample_record: Path) -> None:
    out = bf16_artifact.with_name("int8-scales")
    apply(bf16_artifact, out, find_recipe("int8"), record.read(sample_record))
    model = ir.load(out / "transformer" / "model.onnx")
    scaled = [node for node in model.graph if "/Mul_scale_" in (node.name or "")]
    assert len(scaled) == 2 * 12 + 4 * (5 + 1)  # layers of two double blocks; pieces of four single blocks
    for node in scaled:
        cast = node.inputs[1].producer() if node.inputs[1] is not None else None
        assert cast is not None
        assert cast.op_type == "Cast"
        assert node.outputs[0].dtype == ir.DataType.BFLOAT16
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        assert before is not None
        assert before.op_type in ("Split", "MatMul")


def test_channel_scales_are_numbers_of_bf16(quantized_of: QuantizedOf) -> None:
    scales = [
        tensor
        for name, tensor in load_file(quantized_of("int8") / "transformer" / FILE).items()
        if name.endswith(".scale")
    ]
    assert len(scales) == 24
    assert all(torch.equal(tensor, tensor.bfloat16().float()) for tensor in scales)


def test_every_quantized_product_of_the_bf16_twin_is_in_bf16_with_fp32_scales(twins: tuple[Path, Path]) -> None:
    model = ir.load(twins[1] / "transformer" / "model.onnx")
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[1] is not None
            assert node.inputs[1].dtype == ir.DataType.FLOAT
        if node.op_type == "DequantizeLinear":
            assert node.outputs[0].dtype == ir.DataType.BFLOAT16
            assert {use.node.outputs[0].dtype for use in node.outputs[0].uses()} == {ir.DataType.BFLOAT16}


def test_tensorrt_supports_every_node_of_the_bf16_twin(twins: tuple[Path, Path]) -> None:
    findings, _ = lint(twins[1])
    assert [str(finding) for finding in findings] == []
