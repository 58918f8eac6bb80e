"""Every rule of TensorRT and ONNX Runtime for fusing quantized products, checked on the sample's graphs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from export.lint.lint import lint
from export.values import read_all
from kit.artifact import read_manifest
from kit.errors import UsageError
from kit.ports import PartName
from kit.recipes import RECIPES, find_recipe
from quantize.apply.apply import apply
from quantize.apply.write import FILE
from quantize.calibration import record
from quantize.linears import stored

QuantizedOf = Callable[[str], Path]
CASES: list[tuple[str, PartName]] = [
    ("fp8", "transformer"),
    ("fp8-channel", "transformer"),
    ("int8", "transformer"),
    ("int4-weights", "transformer"),
    ("int8-weights", "text_encoder"),
    ("fp8", "text_encoder"),
    ("int8", "text_encoder"),
]
CODES = {"fp8": ir.DataType.FLOAT8E4M3FN, "int8": ir.DataType.INT8, "int4": ir.DataType.INT4}
WIDTH, MLP = 192, 576  # of the sample's transformer


@cache
def load(graph: Path) -> ir.Model:
    model = ir.load(graph)
    ir.external_data.set_base_dir(model.graph, graph.parent)
    return model


@pytest.fixture(params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, PartName]:
    chosen: tuple[str, PartName] = request.param
    return chosen


@pytest.fixture
def model(case: tuple[str, PartName], quantized_of: QuantizedOf) -> ir.Model:
    recipe, part = case
    return load(quantized_of(recipe) / part / "model.onnx")


def nodes(model: ir.Model, op: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == op]


def of_weights(model: ir.Model) -> list[ir.Node]:
    return [node for node in nodes(model, "DequantizeLinear") if known(node.inputs[0]).is_initializer()]


def of_activations(model: ir.Model) -> list[ir.Node]:
    return [node for node in nodes(model, "DequantizeLinear") if not known(node.inputs[0]).is_initializer()]


def known(value: ir.Value | None) -> ir.Value:
    assert value is not None
    return value


def numbers(value: ir.Value | None) -> npt.NDArray[np.float32]:
    constant = known(value).const_value
    assert constant is not None
    return np.asarray(constant.numpy()).astype(np.float32)


def source_of(model: ir.Model, name: str, folder: Path) -> npt.NDArray[np.float32]:
    """Read a weight of an export; onnx_ir does not open its files, because they are hard links."""
    tensor = model.graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return read_all(stored(tensor, folder))


def number_of(case: tuple[str, PartName]) -> str:
    return case[0].split("-")[0]


def test_every_operator_is_a_standard_one_of_opset_23(model: ir.Model) -> None:
    assert dict(model.opset_imports) == {"": 23}
    assert {node.domain for node in model.graph} == {""}
    assert of_weights(model)


def test_weights_are_stored_as_codes_with_only_a_dequantize(model: ir.Model, case: tuple[str, PartName]) -> None:
    for node in of_weights(model):
        codes = known(node.inputs[0])
        assert codes.dtype == CODES[number_of(case)]
        assert isinstance(codes.const_value, ir.ExternalTensor)
        assert codes.const_value.location == FILE
        assert len(node.inputs) == 2  # no zero point means zero
    quantizing = {known(node.inputs[0]).name for node in nodes(model, "QuantizeLinear")}
    assert not quantizing & set(model.graph.initializers)


def test_activations_are_quantized_and_dequantized_with_one_zero_point_of_zero(
    model: ir.Model, case: tuple[str, PartName]
) -> None:
    found = of_activations(model)
    assert bool(found) == ("weights" not in case[0])
    for node in found:
        before = known(node.inputs[0]).producer()
        assert before is not None
        assert before.op_type == "QuantizeLinear"
        assert before.inputs[1:] == node.inputs[1:]
        zero = known(node.inputs[2])
        assert zero.dtype == CODES[number_of(case)]
        assert zero.is_initializer()
        assert numbers(zero) == 0


def test_activations_have_one_positive_fp32_scale_per_tensor(model: ir.Model) -> None:
    for node in of_activations(model):
        scale = known(node.inputs[1])
        assert scale.dtype == ir.DataType.FLOAT
        assert numbers(scale).shape == ()
        assert 0 < numbers(scale) < np.inf


def test_scales_of_weights_are_fp32_positive_and_of_the_schemes_shape(
    model: ir.Model, case: tuple[str, PartName]
) -> None:
    for node in of_weights(model):
        scale, values = known(node.inputs[1]), numbers(node.inputs[1])
        assert scale.dtype == ir.DataType.FLOAT
        assert values.min() > 0
        assert np.isfinite(values).all()
        assert known(node.inputs[0]).shape is not None
        inputs, outputs = (int(size) for size in known(node.inputs[0]).shape or ())
        axis, block = node.attributes.get_int("axis", None), node.attributes.get_int("block_size", None)
        match case[0]:
            case "fp8":
                assert (values.shape, axis, block) == ((), None, None)
            case "int4-weights":
                assert (values.shape, axis, block) == ((inputs // 64, outputs), 0, 64)
            case _:
                assert (values.shape, axis, block) == ((outputs,), 1, None)


def test_dequantize_gives_the_compute_type_by_its_output_dtype(model: ir.Model) -> None:
    for node in nodes(model, "DequantizeLinear"):
        assert node.attributes.get_int("output_dtype", None) == ir.DataType.FLOAT
        assert node.outputs[0].dtype == ir.DataType.FLOAT


def test_no_node_comes_between_a_dequantize_and_its_product(model: ir.Model) -> None:
    for node in nodes(model, "DequantizeLinear"):
        uses = list(node.outputs[0].uses())
        assert {use.node.op_type for use in uses} == {"MatMul"}
        if known(node.inputs[0]).is_initializer():
            assert [use.idx for use in uses] == [1]
        assert not node.outputs[0].is_graph_output()


def test_a_quantized_weight_meets_a_quantized_activation_of_its_number(
    model: ir.Model, case: tuple[str, PartName]
) -> None:
    if "weights" in case[0]:
        return
    for node in of_weights(model):
        (use,) = node.outputs[0].uses()
        before = known(use.node.inputs[0]).producer()
        if ".mlp.down_proj" not in (use.node.name or ""):
            assert before is not None
            assert before.op_type == "DequantizeLinear"
            assert known(before.inputs[0]).dtype == CODES[number_of(case)]


def test_every_activation_is_quantized_once(model: ir.Model) -> None:
    sources = [known(node.inputs[0]).name for node in nodes(model, "QuantizeLinear")]
    assert len(sources) == len(set(sources))


@pytest.mark.parametrize("recipe", ["fp8", "int8", "int4-weights"])
def test_layers_that_share_an_activation_are_one_product_and_a_split(recipe: str, quantized_of: QuantizedOf) -> None:
    model = load(quantized_of(recipe) / "transformer" / "model.onnx")
    products = [use.node for node in of_weights(model) for use in node.outputs[0].uses()]
    assert len(products) == 2 * (1 + 1 + 2 + 2 + 2) + 4 * 2
    fused = [node for node in products if re.search(r"\+\d/MatMul$", node.name or "")]
    assert [node.name for node in fused] == [
        f"transformer_blocks.{i}.attn.{first}+2/MatMul" for i in range(2) for first in ("add_q_proj", "to_q")
    ]
    for node in fused:
        (use,) = node.outputs[0].uses()
        split = use.node
        assert split.op_type == "Split"
        assert split.attributes.get_int("axis", None) == -1
        assert numbers(split.inputs[1]).tolist() == [WIDTH] * 3
        assert list(known(node.inputs[1]).shape or ()) == [WIDTH, 3 * WIDTH]


def test_every_output_has_a_product_of_its_own_where_attention_is_quantized(with_attention: Path) -> None:
    model = load(with_attention / "transformer" / "model.onnx")
    products = [use.node for node in of_weights(model) for use in node.outputs[0].uses()]
    assert len(products) == 48
    assert not [node.name for node in products for use in node.outputs[0].uses() if use.node.op_type == "Split"]
    block = "single_transformer_blocks.1.attn.to_qkv_mlp_proj"
    pieces = [node for node in products if (node.name or "").startswith(f"{block}.")]
    shapes = [list(known(node.inputs[1]).shape or ()) for node in pieces]
    assert shapes == [[WIDTH, WIDTH]] * 3 + [[WIDTH, MLP]] * 2
    assert len({known(node.inputs[0]).name for node in pieces}) == 1  # and the activation is quantized once


@pytest.fixture(scope="module")
def with_attention(sample_artifact: Path, sample_record: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Quantize the sample with a recipe file that includes attention."""
    folder = tmp_path_factory.mktemp("attention")
    (folder / "mine.json").write_text('{"base": "fp8", "attention": "fp8"}')
    apply(sample_artifact, folder / "out", find_recipe(str(folder / "mine.json")), record.read(sample_record))
    return folder / "out"


def test_all_four_operands_of_attention_are_fp8(with_attention: Path) -> None:
    model = load(with_attention / "transformer" / "model.onnx")
    found = nodes(model, "Softmax")
    assert len(found) == 2 + 4
    for softmax in found:
        scores = known(softmax.inputs[0]).producer()
        (use,) = softmax.outputs[0].uses()
        assert use.node.op_type == "QuantizeLinear"
        assert numbers(use.node.inputs[1]) == np.float32(1 / 448)
        (dequantize,) = [use.node for use in use.node.outputs[0].uses()]
        (mix,) = [use.node for use in dequantize.outputs[0].uses()]
        for product in (scores, mix):
            assert product is not None
            for operand in product.inputs:
                assert known(known(operand).producer().inputs[0]).dtype == CODES["fp8"]


def test_attention_stays_as_it_is_in_other_recipes(quantized_of: QuantizedOf) -> None:
    for recipe in ("int8", "fp8"):
        for softmax in nodes(load(quantized_of(recipe) / "transformer" / "model.onnx"), "Softmax"):
            assert [use.node.op_type for use in softmax.outputs[0].uses()] == ["MatMul"]


def test_scales_of_attention_come_from_the_norms_and_from_the_values_seen(
    with_attention: Path, sample_artifact: Path, sample_record: Path
) -> None:
    manifest = read_manifest(with_attention)
    scales = manifest.options["attention_scales"]
    assert len(scales) == 2 + 4
    seen = record.read(sample_record).parts["transformer"]
    source = load(sample_artifact / "transformer" / "model.onnx")
    width = manifest.variant.transformer.head_dim
    for i in range(4):
        block = f"single_transformer_blocks.{i}"
        found = scales[block]
        for kind, factor in (("query", 1.0), ("key", np.sqrt(width))):
            norm = source_of(source, f"{block}.attn.norm_{kind[0]}.weight", sample_artifact / "transformer")
            assert found[kind] == pytest.approx(np.abs(norm).max() * factor / 448, rel=1e-6)
        assert found["value"] == pytest.approx(seen[f"{block}.attn.to_qkv_mlp_proj"].value_amax / 448)


def test_a_record_without_values_is_refused(sample_artifact: Path, sample_record: Path, tmp_path: Path) -> None:
    raw = json.loads(sample_record.read_text())
    for layers in raw["parts"].values():
        for seen in layers.values():
            seen.pop("value_amax", None)
    (tmp_path / "old.json").write_text(json.dumps(raw))
    recipe = replace(RECIPES["fp8"], attention="fp8")
    with pytest.raises(UsageError, match=r"has no values of the attention in transformer_blocks\.0"):
        apply(sample_artifact, tmp_path / "out", recipe, record.read(tmp_path / "old.json"))
    assert not (tmp_path / "out").exists()


def test_layers_outside_the_recipe_keep_their_weights(quantized_of: QuantizedOf, sample_artifact: Path) -> None:
    model, source = (load(folder / "transformer" / "model.onnx") for folder in (quantized_of("int8"), sample_artifact))
    kept = {name: value for name, value in model.graph.initializers.items() if name in source.graph.initializers}
    held = {name for name, value in kept.items() if isinstance(value.const_value, ir.ExternalTensor)}
    assert not {name for name in held if name.endswith(("to_q.weight", "linear_in.weight", "to_out.weight"))}
    assert {"x_embedder.weight", "proj_out.weight", "single_stream_modulation.linear.weight"} <= held
    for name in held:
        assert np.array_equal(numbers(kept[name]), source_of(source, name, sample_artifact / "transformer")), name


def test_codes_times_scales_are_the_weights_to_half_a_step(quantized_of: QuantizedOf, sample_artifact: Path) -> None:
    source = load(sample_artifact / "transformer" / "model.onnx")
    # more than half a step where a scale, rounded to bf16 by up to 1/512, leaves a value beyond the last code
    for recipe, step in (("int8-plain", 0.75), ("int4-weights", 0.52), ("fp8", 16.0)):  # 32: E4M3's largest binade
        model = load(quantized_of(recipe) / "transformer" / "model.onnx")
        for name in ("transformer_blocks.1.ff.linear_out.weight", "single_transformer_blocks.2.attn.to_out.weight"):
            (node,) = [node for node in of_weights(model) if (known(node.inputs[0]).name or "").startswith(name)]
            scales = numbers(node.inputs[1])
            if scales.ndim == 2:
                scales = np.repeat(scales, 64, axis=0)
            weight = source_of(source, name, sample_artifact / "transformer")
            error = np.abs(numbers(node.inputs[0]) * scales - weight.T)
            assert (error <= step * scales * 1.0001).all(), f"{recipe} {name}: {(error / scales).max()}"


@pytest.mark.parametrize("recipe", ["fp8", "int8", "int4-weights"])
def test_tensorrt_supports_every_node(recipe: str, quantized_of: QuantizedOf) -> None:
    findings, counts = lint(quantized_of(recipe))
    assert [str(finding) for finding in findings] == []
    assert counts["transformer"] > 100
