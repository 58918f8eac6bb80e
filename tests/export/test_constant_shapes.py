"""The pass that gives Reshape constant targets, and the count of nodes per block."""

from __future__ import annotations

import onnx_ir as ir

from export.node_report import count_nodes, summary, table
from export.passes.constant_shapes import constant_shapes
from export.passes.name_nodes import SCOPES, module_path
from tests.export.test_passes import chain, constant, graph_input, model_of, operators


def reshape(source: ir.Shape, output: ir.Shape) -> ir.Model:
    """Reshape x to a target that the graph computes."""
    x = graph_input("x", *[size if isinstance(size, int) else str(size.value) for size in source])
    target = ir.node("Shape", [ir.node("Neg", [x]).outputs[0]])
    node = ir.node("Reshape", [x, target.outputs[0]])
    producer = target.inputs[0].producer()
    assert producer is not None
    model = model_of([x], chain(producer, target, node))
    node.outputs[0].shape = output
    return model


def target_of(model: ir.Model) -> list[int]:
    value = model.graph[-1].inputs[1]
    assert value is not None
    assert value.const_value is not None
    numbers: list[int] = value.const_value.numpy().tolist()
    return numbers


def test_a_computed_target_becomes_a_constant_and_its_chain_goes() -> None:
    model = reshape(ir.Shape(["b", "s", 64]), ir.Shape(["b", "s", 2, 32]))
    assert constant_shapes(model)
    assert operators(model) == ["Reshape"]
    assert target_of(model) == [0, 0, 2, 32]
    assert not constant_shapes(model)


def test_one_axis_that_the_input_has_not_is_what_is_left() -> None:
    model = reshape(ir.Shape(["b", 2, "s", 3]), ir.Shape(["b", "2*s", 3]))
    assert constant_shapes(model)
    assert target_of(model) == [0, -1, 3]


def test_two_such_axes_leave_the_reshape_as_it_is() -> None:
    model = reshape(ir.Shape(["b", 8, "h*w"]), ir.Shape(["b", 8, "h", "w"]))
    assert not constant_shapes(model)
    assert operators(model) == ["Neg", "Shape", "Reshape"]


def test_axes_of_unknown_size_are_never_taken_for_equal() -> None:
    model = reshape(ir.Shape([None, None, 64]), ir.Shape([None, None, 2, 32]))
    assert not constant_shapes(model)


def test_a_constant_target_is_left_alone() -> None:
    x, shape = graph_input("x", "b", 6), constant("shape", [-1, 2, 3])
    assert not constant_shapes(model_of([x], chain(ir.node("Reshape", [x, shape])), [shape]))


def test_a_node_without_scopes_stands_where_its_input_stands() -> None:
    x = graph_input("x", 2)
    first = ir.node("Neg", [x], metadata_props={SCOPES: "['', 'model.layers.1', 'neg']"})
    assert module_path(ir.node("Abs", [first.outputs[0]])) == "layers.1"
    assert module_path(ir.node("Abs", [x])) == ""


def test_nodes_of_the_last_block_of_each_kind_are_counted() -> None:
    x, w = graph_input("x", 2, 2), constant("w", [[1.0, 2.0], [3.0, 4.0]])
    turned = ir.node("Transpose", [w], name="transformer_blocks.1.attn/Transpose")
    product = ir.node("MatMul", [x, turned.outputs[0]], name="transformer_blocks.1.attn/MatMul")
    first = ir.node("Neg", [product.outputs[0]], name="transformer_blocks.0/Neg")
    single = ir.node("Abs", [first.outputs[0]], name="single_transformer_blocks.0/Abs")
    last = ir.node("Neg", [single.outputs[0]], name="graph/Neg")
    counts = count_nodes(model_of([x], chain(turned, product, first, single, last), [w]))
    assert counts == {"double": {"MatMul": 1, "Transpose of a weight": 1}, "single": {"Abs": 1}}


def test_a_table_sets_both_counts_side_by_side() -> None:
    assert table({"single": {"Abs": 1, "Cast": 2}}, {"single": {"Abs": 1}}).splitlines() == [
        "single                           3 ->    1",
        "  Abs                            1 ->    1",
        "  Cast                           2 ->    0",
    ]


def test_a_summary_gives_the_sums_of_each_kind_of_block() -> None:
    before, after = (
        {"double": {"Add": 3, "Cast": 5}, "single": {"Add": 2}},
        {"double": {"Add": 3}, "single": {"Add": 1}},
    )
    assert summary(before, after) == "double block 8 -> 3 nodes, single block 2 -> 1 nodes"
    assert summary({}, {}) == ""
