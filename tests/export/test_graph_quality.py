"""The blocks of an exported bf16 graph contain no node that prevents a runtime from fusing their products."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx_ir as ir
import pytest

from export.artifact import ExportConfig, PartReport, export
from export.lint.lint import load
from kit import tiny
from kit.ports import PartName

PARTS: tuple[PartName, ...] = ("text_encoder", "transformer", "transformer_extract", "transformer_cached")
QKV = {"to_q", "to_k", "to_v"}, {"add_q_proj", "add_k_proj", "add_v_proj"}, {"q_proj", "k_proj", "v_proj"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[PartName, PartReport]]:
    folder = tmp_path_factory.mktemp("quality")
    checkpoint = tiny.save(folder / "checkpoint", tiny.Tiny("klein-kv", text_tokens=64), dtype="bf16")
    report = export(checkpoint, folder / "out", ExportConfig(PARTS, "bf16"))
    return folder / "out", {part.part: part for part in report.parts}


@pytest.fixture(params=PARTS)
def model(request: pytest.FixtureRequest, made: tuple[Path, dict[PartName, PartReport]]) -> ir.Model:
    folder = "text_encoder" if request.param == "text_encoder" else "transformer"
    suffix = request.param.removeprefix(folder)
    return load(made[0] / folder / f"model{suffix}.onnx")


def computed(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and value.const_value is None]


def of_blocks(model: ir.Model, op: str) -> list[ir.Node]:
    """Return the nodes of one operator that process activations inside blocks."""
    return [n for n in model.graph if n.op_type == op and ("blocks." in n.name or "layers." in n.name) and computed(n)]


def test_casts_stand_around_norms_and_rotations_alone(model: ir.Model) -> None:
    """Statistics of norms and rotations are fp32; everything else in a block, including every product, is bf16."""
    for cast in of_blocks(model, "Cast"):
        (source,), users = computed(cast), {use.node.op_type for use in cast.outputs[0].uses()}
        if cast.attributes["to"].as_int() == ir.DataType.FLOAT:
            # heads, or what they are split from, or the residual stream
            assert source.producer().op_type in {"Reshape", "MatMul", "Split", "Add", "Gather"}, cast.name
            assert users <= {"Mul", "Div"}, cast.name  # the square, and what its mean divides
        else:
            assert users <= {"Transpose", "Mul"} or cast.outputs[0].is_graph_output(), cast.name  # heads, or the weight
    for product in of_blocks(model, "MatMul"):
        assert {value.dtype for value in (*product.inputs, *product.outputs)} == {ir.DataType.BFLOAT16}, product.name


def test_nothing_but_what_folds_stands_between_a_weight_and_its_product(model: ir.Model) -> None:
    products = 0
    for node in model.graph:
        value = node.inputs[1] if node.op_type == "MatMul" else None
        between = []
        while value is not None and value.producer() is not None and len(value.producer().inputs) == 1:
            between.append(value.producer().op_type)
            value = value.producer().inputs[0]
        if value is not None and isinstance(value.const_value, ir.ExternalTensor):
            products += 1
            assert between == ["Transpose"], node.name  # of a constant: computed once, when the engine is built
    assert products > 15


def test_queries_keys_and_values_read_one_tensor(model: ir.Model) -> None:
    inputs: dict[tuple[str, frozenset[str]], Counter[str]] = {}
    for product in of_blocks(model, "MatMul"):
        *block, last = product.name.rpartition("/")[0].split(".")
        for trio in QKV:
            if last in trio:
                key = ".".join(block), frozenset(trio)
                inputs.setdefault(key, Counter())[product.inputs[0].name or ""] += 1
    assert all(list(counter.values()) == [3] for counter in inputs.values()), inputs
    assert inputs


def test_no_shape_is_put_together_inside_a_block(model: ir.Model) -> None:
    assert not of_blocks(model, "Shape")
    assert all(node.inputs[1].const_value is not None for node in of_blocks(model, "Reshape"))


def test_a_block_has_fewer_nodes_than_were_traced(
    made: tuple[Path, dict[PartName, PartReport]],
) -> None:
    for part, report in made[1].items():
        for kind, ops in report.nodes_exported.items():
            before, after = sum(report.nodes_traced[kind].values()), sum(ops.values())
            assert after < before, (part, kind, before, after)
    casts = {kind: ops["Cast"] for kind, ops in made[1]["transformer"].nodes_exported.items()}
    # queries and keys, of both streams and of one: their squares and their heads to fp32, and the rotated heads back
    assert casts == {"double": 2 * 4 + 2, "single": 2 * 2 + 2}
