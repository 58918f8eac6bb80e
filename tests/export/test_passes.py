"""Graph passes, each on a small hand-made graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from export.passes import simplify
from export.passes.clean import clean
from export.passes.merge_constants import merge_constants
from export.passes.name_axes import name_axes
from export.passes.name_nodes import SCOPES, name_nodes


def constant(name: str, values: object) -> ir.Value:
    tensor = ir.tensor(np.asarray(values), name=name)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)


def graph_input(name: str, *dims: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(dims))


def chain(*nodes: ir.Node) -> list[ir.Node]:
    for i, node in enumerate(nodes):
        node.outputs[0].name = f"v{i}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    return list(nodes)


def model_of(inputs: Sequence[ir.Value], nodes: Sequence[ir.Node], initializers: Sequence[ir.Value] = ()) -> ir.Model:
    outputs = [nodes[-1].outputs[0]]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports={"": 23}, name="test")
    return ir.Model(graph, ir_version=11)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_equal_constants_are_merged_and_others_kept() -> None:
    x = graph_input("x", 2)
    a, b, c = constant("a", [1.0, 2.0]), constant("b", [1.0, 2.0]), constant("c", [1, 2])
    first, second = ir.node("Add", [x, a]), ir.node("Add", [x, b])
    shaped = ir.node("Reshape", [ir.node("Mul", [first.outputs[0], second.outputs[0]]).outputs[0], c])
    mul = shaped.inputs[0].producer()
    model = model_of([x], chain(first, second, mul, shaped), [a, b, c])
    assert merge_constants(model)
    assert list(model.graph.initializers) == ["a", "c"]
    assert second.inputs[1] is a
    assert not merge_constants(model)


def test_external_tensors_are_neither_merged_nor_read(tmp_path: Path) -> None:
    x = graph_input("x", 2)
    weights = []
    for name in ("w1", "w2"):
        value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
        value.const_value = ir.ExternalTensor(
            "absent.safetensors", 0, 8, ir.DataType.FLOAT, shape=ir.Shape([2]), name=name, base_dir=str(tmp_path)
        )
        weights.append(value)
    first = ir.node("Add", [x, weights[0]])
    model = model_of([x], chain(first, ir.node("Add", [first.outputs[0], weights[1]])), weights)
    assert not merge_constants(model)
    assert list(model.graph.initializers) == ["w1", "w2"]


def test_constants_are_folded_and_weights_without_values_stay() -> None:
    x = graph_input("x", 2)
    a, b = constant("a", np.array([1, 2], np.float32)), constant("b", np.array([3, 4], np.float32))
    weight = ir.Value(name="model.w", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([2]))
    known, scaled = ir.node("Add", [a, b]), ir.node("Neg", [weight])
    product = ir.node("Mul", [x, known.outputs[0]])
    nodes = chain(known, scaled, product, ir.node("Add", [product.outputs[0], scaled.outputs[0]]))
    model = model_of([x], nodes, [a, b, weight])
    assert clean(model)
    assert sorted(operators(model)) == ["Add", "Mul", "Neg"]
    folded = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    assert [t.numpy().tolist() for t in folded] == [[4.0, 6.0]]
    assert "model.w" in model.graph.initializers


def test_a_graph_with_nothing_to_clean_is_left_alone() -> None:
    x = graph_input("x", 2)
    model = model_of(
        [x],
        chain(
            ir.node("Neg", [x]),
        ),
    )
    assert not clean(model)
    assert operators(model) == ["Neg"]


def test_nodes_are_named_by_module_path_and_numbered() -> None:
    x = graph_input("x", 2)
    scope = {SCOPES: "['', 'model.blocks.0', 'model.blocks.0.norm', 'mul_1']"}
    first = ir.node("Mul", [x, x], metadata_props=scope)
    second = ir.node("Mul", [first.outputs[0], x], metadata_props=scope)
    model = model_of(
        [x], chain(first, second, ir.node("Neg", [second.outputs[0]], metadata_props={SCOPES: "['', 'neg']"}))
    )
    assert name_nodes(model)
    assert [node.name for node in model.graph] == ["blocks.0.norm/Mul", "blocks.0.norm/Mul_2", "graph/Neg"]
    assert first.outputs[0].name == "blocks.0.norm/Mul:0"
    assert model.graph.outputs[0].name == "v2"  # an output keeps the name of its port


def test_simplify_leaves_no_metadata_of_the_exporter() -> None:
    x = graph_input("x", 2)
    node = ir.node("Neg", [x], metadata_props={SCOPES: "['', 'model.a', 'neg']", "pkg.torch.onnx.stack_trace": "file"})
    model = model_of([x], chain(node))
    node.outputs[0].metadata_props["pkg.torch.onnx.original_node_name"] = "neg"
    simplify(model)
    assert node.name == "a/Neg"
    assert not node.metadata_props
    assert not node.outputs[0].metadata_props


def test_a_squeeze_is_told_its_axes() -> None:
    x = graph_input("x", 1, 3, 1)
    model = model_of([x], chain(ir.node("Squeeze", [x])))
    assert name_axes(model)
    axes = model.graph[0].inputs[1]
    assert axes is not None
    assert axes.const_value is not None
    assert axes.const_value.numpy().tolist() == [0, 2]
    assert not name_axes(model)


def test_a_squeeze_whose_axes_cannot_be_told_is_named() -> None:
    x = graph_input("x", "n", 3)
    model = model_of([x], chain(ir.node("Squeeze", [x], name="here")))
    with pytest.raises(ValueError, match="here: cannot tell which axes of"):
        name_axes(model)
