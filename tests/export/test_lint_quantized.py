"""The linter on quantized graphs: accepts those that TensorRT fuses and reports each rule on a graph that breaks it."""

from __future__ import annotations

import itertools
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from export.lint.lint import lint_model
from export.lint.operators import VERSIONS
from tests.export.test_lint import graph, node

F32, F16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
I8, U8, I4, I32 = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.INT32
FP8, FP4 = TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT4E2M1
NUMPY: dict[int, Any] = {
    F32: np.float32,
    F16: np.float16,
    BF16: ml_dtypes.bfloat16,
    I8: np.int8,
    U8: np.uint8,
    I4: ml_dtypes.int4,
    I32: np.int32,
    FP8: ml_dtypes.float8_e4m3fn,
    FP4: ml_dtypes.float4_e2m1fn,
}
K, N = 64, 48


def constant(name: str, dtype: int, *shape: int, value: float = 1.0) -> TensorProto:
    """Make an initializer of any type, including four-bit types."""
    tensor = ir.Tensor(np.full(shape, value, NUMPY[dtype]), dtype=ir.DataType(dtype), name=name)
    return ir.to_proto(tensor)


def constants(*tensors: TensorProto) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in tensors}


def linear(
    weights: int = I8,
    wide: int = F32,
    activations: int | None = I8,
    scales: tuple[int, ...] = (),
    between: str | None = None,
    scale: int | None = None,
    **layout: int,
) -> ir.Model:
    """Make one linear layer as written for TensorRT: Q and DQ on the input, only DQ on the weight [K, N]."""
    nodes = []
    values = [constant("w", weights, K, N), constant("ws", scale or F32, *scales, value=0.5)]
    product = "x"
    if activations is not None:
        values += [constant("xs", F32, value=0.25), constant("xz", activations, value=0.0)]
        nodes = [node("QuantizeLinear", "x,xs,xz", "q"), node("DequantizeLinear", "q,xs,xz", "xd", output_dtype=wide)]
        product = "xd"
    nodes.append(node("DequantizeLinear", "w,ws", "wd", output_dtype=wide, **layout))
    right = "wd"
    if between is not None:
        values += [constant("half", wide, value=0.5)] if between == "Mul" else []
        attributes: dict[str, dict[str, Any]] = {"Transpose": {"perm": [0, 1, 2]}, "Cast": {"to": wide}}
        operands = f"{product},half" if between == "Mul" else product
        nodes.append(node(between, operands, "b", **attributes.get(between, {})))
        product = "b"
    nodes.append(node("MatMul", f"{product},{right}"))
    return graph(nodes, constants(*values), [("x", wide, ["n", 16, K])], ("y", wide))


def rules(model: ir.Model) -> list[str]:
    return [f"{finding.node}: {finding.rule}" for finding in lint_model(model, "part")]


GOOD: dict[str, ir.Model] = {
    f"{ir.DataType(weights)}, {ir.DataType(wide)}, {form}": linear(
        weights, wide, activations, scales, scale=wide if weights == I4 and layout.get("block_size") else F32, **layout
    )
    for (weights, activations), wide, (form, scales, layout) in itertools.product(
        [(I8, I8), (FP8, FP8), (I8, None), (FP8, None), (I4, None)],
        [F32, BF16, F16],
        [
            ("per tensor", (), {}),
            ("per channel", (N,), {"axis": 1}),
            ("in blocks", (K // 16, N), {"axis": 0, "block_size": 16}),
        ],
    )
}


@pytest.mark.parametrize("name", GOOD)
def test_a_linear_as_tensorrt_fuses_it_passes_for_every_version(name: str) -> None:
    assert VERSIONS == ("10.13", "10.16", "11.x")
    assert rules(GOOD[name]) == []
    onnx.checker.check_model(ir.to_proto(GOOD[name]))


@pytest.mark.parametrize("wide", [BF16, F16])
def test_blocks_of_int4_need_scales_of_the_type_of_their_result(wide: int) -> None:
    """The compiler says: could not infer output types for operation dequantize."""
    (found,) = rules(linear(I4, wide, None, (K // 16, N), axis=0, block_size=16))
    assert "INT4 in blocks has FLOAT scales" in found
    assert rules(linear(I4, F32, None, (K // 16, N), axis=0, block_size=16)) == []


def weight_only(*values: TensorProto, opset: int = 23, zero: bool = False, **attributes: Any) -> ir.Model:
    """Dequantize a weight `w` with scales `ws` and, if present, the zero point `wz`, and multiply with it."""
    operands = "w,ws,wz" if zero else "w,ws"
    nodes = [node("DequantizeLinear", operands, "d", **attributes), node("MatMul", "x,d")]
    return graph(nodes, constants(*values), [("x", F32, ["n", 16, K])], opset=opset)


def on_activation(
    *values: TensorProto, wide: int = F32, opset: int = 23, q: dict[str, Any] | None = None, dq: Any = None
) -> ir.Model:
    """Quantize and dequantize the input with the scale `s` and the zero point `z`."""
    nodes = [node("QuantizeLinear", "x,s,z", "c", **(q or {})), node("DequantizeLinear", "c,s,z", **(dq or {}))]
    return graph(nodes, constants(*values), [("x", wide, ["n", 16, 8])], ("y", wide), opset)


W8 = constant("w", I8, K, N)
S, Z = constant("s", F32, value=0.5), constant("z", I8, value=0.0)
BROKEN: dict[str, tuple[ir.Model, str]] = {
    "a zero point of another type": (
        weight_only(W8, constant("ws", F32), constant("wz", FP8, value=0.0), zero=True),
        "its zero point is FLOAT8E4M3FN, its codes are INT8",
    ),
    "one zero point for many scales": (
        weight_only(W8, constant("ws", F32, N), constant("wz", I8, 1, value=0.0), zero=True, axis=1),
        "has 1 zero points for 48 scales",
    ),
    "a zero point per channel that is not zero": (
        weight_only(W8, constant("ws", F32, N), constant("wz", I8, N, value=1), zero=True, axis=1),
        "its zero point is not zero",
    ),
    "a computed zero point": (
        graph(
            [node("Cast", "f", "z", to=I8), node("QuantizeLinear", "x,s,z", "c"), node("DequantizeLinear", "c,s,z")],
            constants(S),
            [("x", F32, ["n", 16, 8]), ("f", F32, [])],
        ),
        "its zero point is computed",
    ),
    "a negative scale": (weight_only(W8, constant("ws", F32, value=-1)), "its scale is not strictly positive"),
    "one scale of many that is zero": (
        weight_only(W8, helper.make_tensor("ws", F32, [N], [1.0] * (N - 1) + [0.0]), axis=1),
        "its scale is not strictly positive",
    ),
    "an infinite scale": (
        weight_only(W8, constant("ws", F32, value=float("inf"))),
        "its scale is not strictly positive",
    ),
    "an integer scale": (weight_only(W8, constant("ws", I32)), "its scale is INT32"),
    "an fp16 scale of a bf16 activation": (
        on_activation(constant("s", F16), Z, wide=BF16, dq={"output_dtype": BF16}),
        "its scale is FLOAT16 while the wide type is BFLOAT16",
    ),
    "a bf16 scale of a weight that becomes fp32": (
        weight_only(W8, constant("ws", BF16), output_dtype=F32),
        "its scale is BFLOAT16 while the wide type is FLOAT",
    ),
    "too many scales": (weight_only(W8, constant("ws", F32, K), axis=1), "has 64 scales for the 48 entries of axis 1"),
    "scales for another axis": (
        weight_only(W8, constant("ws", F32, N), axis=0),
        "has 48 scales for the 64 entries of axis 0",
    ),
    "the default axis, where the other was meant": (
        weight_only(W8, constant("ws", F32, K)),
        "has 64 scales for the 48 entries of axis 1",
    ),
    "scales of two dimensions without blocks": (
        weight_only(W8, constant("ws", F32, K, N)),
        "its scales have 2 dimensions",
    ),
    "an activation in blocks": (
        on_activation(
            constant("s", F32, 1, 16, 2),
            constant("z", I8, 1, 16, 2, value=0.0),
            q={"axis": 2, "block_size": 4},
            dq={"axis": 2, "block_size": 4},
        ),
        "an activation is quantized in blocks",
    ),
    "an activation with a scale per channel behind its DQ alone": (
        graph(
            [node("QuantizeLinear", "x,s,z", "c"), node("DequantizeLinear", "c,many", axis=2)],
            constants(S, Z, constant("many", F32, 8)),
        ),
        "the/DequantizeLinear: an activation has more than one scale",
    ),
    "blocks along two axes": (
        weight_only(W8, constant("ws", F32, K // 16, N // 16), axis=0, block_size=16),
        "has scales [4, 3]; [64, 48] in blocks of 16 along axis 0 needs [4, 48]",
    ),
    "blocks along the other axis": (
        weight_only(W8, constant("ws", F32, K // 16, N), axis=1, block_size=16),
        "has scales [4, 48]; [64, 48] in blocks of 16 along axis 1 needs [64, 3]",
    ),
    "blocks that do not fill the axis": (
        weight_only(W8, constant("ws", F32, 3, N), axis=0, block_size=24),
        "axis 0 has 64 entries, which blocks of 24 do not fill",
    ),
    "blocks below opset 21": (
        weight_only(W8, constant("ws", F32, K // 16, N), axis=0, block_size=16, opset=19),
        "block_size needs opset 21, the graph has 19",
    ),
    "FP8 below opset 19": (
        weight_only(constant("w", FP8, K, N), constant("ws", F32), opset=17),
        "FLOAT8E4M3FN needs opset 19, the graph has 17",
    ),
    "INT4 below opset 21": (
        weight_only(constant("w", I4, K, N), constant("ws", F32), opset=20),
        "INT4 needs opset 21, the graph has 20",
    ),
    "output_dtype below opset 23": (
        weight_only(W8, constant("ws", F32), output_dtype=F32, opset=21),
        "output_dtype needs opset 23, the graph has 21",
    ),
    "FP4 in blocks of 32": (
        weight_only(constant("w", FP4, K, N), constant("ws", F32, K // 32, N), axis=0, block_size=32),
        "FP4 in blocks of 32",
    ),
    "an odd number of INT4": (
        graph(
            [node("DequantizeLinear", "w,ws", "d"), node("Add", "x,d")],
            constants(constant("w", I4, 3), constant("ws", F32)),
        ),
        "3 elements of INT4 are an odd number",
    ),
    "an activation in INT4": (
        on_activation(S, constant("z", I4, value=0.0)),
        "quantizes an activation to INT4, which TensorRT supports for weights only",
    ),
    "FP8 of the other kind": (
        graph(
            [node("QuantizeLinear", "x,s", "c", output_dtype=TensorProto.FLOAT8E5M2), node("DequantizeLinear", "c,s")],
            constants(S),
        ),
        "quantizes to FLOAT8E5M2; TensorRT supports INT8, FP8 E4M3",
    ),
    "no zero point, which means UINT8": (
        graph([node("QuantizeLinear", "x,s", "c"), node("DequantizeLinear", "c,s")], constants(S)),
        "quantizes to UINT8; TensorRT supports INT8, FP8 E4M3",
    ),
    "a bias in INT32": (
        graph(
            [node("DequantizeLinear", "w,ws", "d"), node("Add", "x,d")],
            constants(constant("w", I32, 8), constant("ws", F32)),
        ),
        "dequantizes INT32",
    ),
    "whole numbers quantized": (
        graph(
            [node("QuantizeLinear", "x,s,z", "c"), node("DequantizeLinear", "c,s,z")],
            constants(S, Z),
            [("x", I32, ["n", 8])],
        ),
        "quantizes x, which is INT32",
    ),
    "codes as an input of the graph": (
        graph([node("DequantizeLinear", "x,s")], constants(S), [("x", I8, ["n", 8])]),
        "its input is neither from a QuantizeLinear nor an initializer",
    ),
    "codes as an output of the graph": (
        graph([node("QuantizeLinear", "x,s,z")], constants(S, Z), output=("y", I8)),
        "its output is read by an operator other than DequantizeLinear",
    ),
    "a weight turned before it is dequantized": (
        graph(
            [node("Transpose", "w", "t"), node("DequantizeLinear", "t,ws", "d"), node("MatMul", "x,d")],
            constants(constant("w", I8, N, K), constant("ws", F32)),
            [("x", F32, ["n", 16, K])],
        ),
        "the/Transpose: w is INT8 outside QuantizeLinear and DequantizeLinear",
    ),
    "a weight in FP8 multiplied as it is": (
        graph([node("Cast", "w", "d", to=F32), node("Mul", "x,d")], constants(constant("w", FP8, 8))),
        "the/Cast: w is FLOAT8E4M3FN outside QuantizeLinear and DequantizeLinear",
    ),
    "a product of two types": (
        graph(
            [node("DequantizeLinear", "w,ws", "d"), node("MatMul", "x,d")],
            constants(W8, constant("ws", F32)),
            [("x", BF16, ["n", 16, K])],
            ("y", BF16),
        ),
        "the/MatMul: x is BFLOAT16 and d is FLOAT; a strongly typed network requires one type",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_graph_is_told_node_and_rule(name: str) -> None:
    model, expected = BROKEN[name]
    found = rules(model)
    assert any(expected in rule for rule in found), found


@pytest.mark.parametrize("between", ["Cast", "Mul", "Transpose"])
def test_what_stands_between_dequantize_and_the_product_is_named(between: str) -> None:
    (finding,) = lint_model(linear(between=between), "part")
    assert finding.node == "the/MatMul"
    assert finding.rule.startswith(f"the/{between} ({between}) is between DequantizeLinear and the product")
    assert finding.versions == VERSIONS


def test_a_weight_may_be_turned_where_it_alone_is_quantized() -> None:
    """It is dequantized before the product anyway; this is how FP8 single files are exported without rewriting them."""
    model = graph(
        [node("DequantizeLinear", "w,ws", "d"), node("Transpose", "d", "t"), node("MatMul", "x,t")],
        constants(constant("w", FP8, N, K), constant("ws", F32)),
        [("x", F32, ["n", 16, K])],
    )
    assert rules(model) == []


def test_scales_may_be_constant_nodes_and_casts_of_constants() -> None:
    scale = helper.make_node("Constant", [], ["half"], value_float=0.5, name="the/Constant")
    model = graph(
        [
            scale,
            node("Cast", "half", "s", to=F32),
            node("QuantizeLinear", "x,s,z", "c"),
            node("DequantizeLinear", "c,s,z"),
        ],
        constants(Z),
    )
    assert rules(model) == []
