"""The linter reports each rule on a hand-made graph that breaks it, and nothing on exported graphs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.__main__ import main
from export.artifact import ExportConfig, export
from export.lint.lint import lint, lint_model
from export.lint.operators import TensorRT, parse_versions, release, table
from kit.errors import UsageError
from kit.ports import parts_of
from kit.variants import FAMILY_DEFAULTS, Family
from tests.conftest import ByFamily

F32, I8, U8, F64, I64 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.UINT8, TensorProto.DOUBLE, TensorProto.INT64
ACTIVATION = ("x", F32, ["n", 16, 8])


def graph(
    nodes: Sequence[onnx.NodeProto],
    constants: dict[str, Any] | None = None,
    inputs: Sequence[tuple[str, int, Sequence[Any]]] = (ACTIVATION,),
    output: tuple[str, int] = ("y", F32),
    opset: int = 23,
) -> ir.Model:
    """Make a model of a few nodes and infer its types."""
    model = helper.make_model(
        helper.make_graph(
            list(nodes),
            "hand-made",
            [helper.make_tensor_value_info(*entry) for entry in inputs],
            [helper.make_tensor_value_info(output[0], output[1], None)],
            [
                value if isinstance(value, TensorProto) else numpy_helper.from_array(np.asarray(value), name)
                for name, value in (constants or {}).items()
            ],
        ),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
    )
    return ir.from_proto(onnx.shape_inference.infer_shapes(model, data_prop=True))


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(","), outputs.split(","), name=f"the/{op}", **attributes)


def rules(model: ir.Model, versions: Sequence[TensorRT] = ("11.x",)) -> list[str]:
    return [f"{finding.node}: {finding.rule}" for finding in lint_model(model, "part", versions)]


ONE = np.float32(0.5)
HEADS = [(name, F32, ["b", 2, "s", 8]) for name in "qkv"]
QDQ = [node("QuantizeLinear", "x,scale,zero", "q"), node("DequantizeLinear", "q,scale,zero")]
ZERO = np.int8(0)

BROKEN: dict[str, tuple[ir.Model, str]] = {
    "an operator that the table refuses": (graph([node("Det", "x")]), "the/Det: the operator is not supported"),
    "an operator that the table does not know": (
        graph([helper.make_node("MatMulNBits", ["x"], ["y"], name="the/node", domain="com.microsoft")]),
        "domain 'com.microsoft' is not standard ONNX",
    ),
    "an old opset": (graph([node("Relu", "x")], opset=8), "opset 8 is outside 9 to 24"),
    "a double": (
        graph([node("Cast", "x", "d", to=F64), node("Cast", "d", to=F32)]),
        "d is DOUBLE, for which TensorRT has no kernels",
    ),
    "a type that the operator does not take": (
        graph([node("MatMul", "x,w")], {"w": np.zeros((8, 8), np.int64)}, [("x", I64, ["n", 16, 8])], ("y", I64)),
        "x is INT64; the operator takes BF16, FP16, FP32",
    ),
    "int8 outside Q/DQ": (
        graph(
            [node("QuantizeLinear", "x,scale,zero", "q"), node("Transpose", "q", perm=[0, 2, 1])],
            {"scale": ONE, "zero": ZERO},
            output=("y", I8),
        ),
        "q is INT8 outside QuantizeLinear and DequantizeLinear",
    ),
    "uint8 inside": (
        graph([node("Cast", "x", "u", to=U8), node("Cast", "u", to=F32)]),
        "u is UINT8; TensorRT supports UINT8 only as a graph output",
    ),
    "computed axes": (
        graph([node("Shape", "x", "axes"), node("ReduceSum", "x,axes")]),
        "axes is computed in the graph, it must be an initializer",
    ),
    "squeeze without axes": (graph([node("Squeeze", "x")]), "axes are omitted"),
    "attention in three dimensions": (
        graph(
            [node("Attention", "q,k,v", q_num_heads=2, kv_num_heads=2)],
            inputs=[(n, F32, ["b", "s", 16]) for n in "qkv"],
        ),
        "Q has 3 dimensions, it must have 4",
    ),
    "attention with a cache": (
        graph(
            [node("Attention", "q,k,v,,p,r", "y,pk,pv")], inputs=[*HEADS, *[(n, F32, ["b", 2, "t", 8]) for n in "pr"]]
        ),
        "past_key is not supported",
    ),
    "attention with softcap": (
        graph([node("Attention", "q,k,v", softcap=2.0)], inputs=HEADS),
        "softcap is not supported",
    ),
    "a norm's second output": (
        graph([node("LayerNormalization", "x,w", "a,m"), node("Add", "a,m")], {"w": np.ones(8, np.float32)}),
        "only the first output is supported",
    ),
    "cubic resize": (
        graph([node("Resize", "x,,s", mode="cubic")], {"s": np.ones(3, np.float32)}),
        "mode 'cubic' is not supported",
    ),
    "antialiased resize": (
        graph([node("Resize", "x,,s", mode="linear", antialias=1)], {"s": np.ones(3, np.float32)}),
        "antialiasing is not supported",
    ),
    "resize with another nearest mode": (
        graph(
            [node("Resize", "x,,s", coordinate_transformation_mode="half_pixel_symmetric")],
            {"s": np.ones(3, np.float32)},
        ),
        "coordinate_transformation_mode 'half_pixel_symmetric' is not supported",
    ),
    "scatter with a reduction": (
        graph(
            [node("ScatterND", "x,i,u", reduction="add")],
            {"i": np.zeros((1, 3), np.int64), "u": np.ones(1, np.float32)},
        ),
        "reduction 'add' is not supported",
    ),
    "a large top-k": (
        graph([node("TopK", "x,k", "y,i")], {"k": np.array([4000])}),
        "K is 4000, it must be less than 3840",
    ),
    "position ids of another type": (
        graph(
            [node("RotaryEmbedding", "q,c,c,p")],
            {"c": np.ones((4, 4), np.float32), "p": np.zeros((1, 4), np.int32)},
            HEADS[:1],
        ),
        "position_ids are INT32, they must be INT64",
    ),
    "dilated pooling": (
        graph([node("AveragePool", "q", kernel_shape=[2, 2], dilations=[2, 2])], inputs=HEADS[:1]),
        "dilations [2, 2] must be empty or all ones",
    ),
    "a zero scale": (graph(QDQ, {"scale": np.float32(0), "zero": ZERO}), "its scale is not strictly positive"),
    "a scale that is not a number": (
        graph(QDQ, {"scale": np.float32("nan"), "zero": ZERO}),
        "its scale is not strictly positive",
    ),
    "a zero point that is not zero": (graph(QDQ, {"scale": ONE, "zero": np.int8(3)}), "its zero point is not zero"),
    "an unsigned zero point": (
        graph(QDQ, {"scale": ONE, "zero": np.uint8(0)}),
        "quantizes to UINT8; TensorRT supports INT8, FP8 E4M3",
    ),
    "a computed scale": (
        graph([node("ReduceMax", "x", "scale", keepdims=0), *QDQ], {"zero": ZERO}),
        "its scale is not an initializer",
    ),
    "an activation per channel": (
        graph(
            [node("QuantizeLinear", "x,scale,zero", "q", axis=2), node("DequantizeLinear", "q,scale,zero", axis=2)],
            {"scale": np.full(8, 0.5, np.float32), "zero": np.zeros(8, np.int8)},
        ),
        "an activation has more than one scale",
    ),
    "a weight with too few scales": (
        graph(
            [node("DequantizeLinear", "w,scale", "d", axis=0), node("MatMul", "x,d")],
            {"w": np.ones((8, 6), np.int8), "scale": np.full(6, 0.5, np.float32)},
        ),
        "has 6 scales for the 8 entries of axis 0",
    ),
    "an axis that is not there": (
        graph(
            [node("DequantizeLinear", "w,scale", "d", axis=5), node("MatMul", "x,d")],
            {"w": np.ones((8, 6), np.int8), "scale": np.full(6, 0.5, np.float32)},
        ),
        "axis 5 is outside the 2 dimensions of its input",
    ),
    "something between quantize and dequantize": (
        graph(
            [
                node("QuantizeLinear", "x,scale,zero", "q"),
                node("Identity", "q", "i"),
                node("DequantizeLinear", "i,scale,zero"),
            ],
            {"scale": ONE, "zero": ZERO},
        ),
        "its input is neither from a QuantizeLinear nor an initializer",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_graph_is_told_node_and_rule(name: str) -> None:
    model, expected = BROKEN[name]
    found = rules(model)
    assert any(expected in rule for rule in found), found


@pytest.mark.parametrize(
    ("op", "model", "older"),
    [
        ("Attention", graph([node("Attention", "q,k,v")], inputs=HEADS), ("10.13",)),
        ("RMSNormalization", graph([node("RMSNormalization", "x,w")], {"w": np.ones(8, np.float32)}), ("10.13",)),
        ("Swish", graph([node("Swish", "x")], opset=24), ("10.13", "10.16")),
    ],
)
def test_an_operator_is_too_new_for_older_versions_only(op: str, model: ir.Model, older: tuple[TensorRT, ...]) -> None:
    (finding,) = lint_model(model, "part")
    assert finding.versions == older
    assert "the operator was added in TensorRT" in finding.rule
    assert not lint_model(model, "part", ("11.x",))


@pytest.mark.parametrize("family", ["klein", "klein-base", "klein-kv", "dev"])
def test_exported_graphs_pass_for_every_version(family: Family, artifact_of: ByFamily) -> None:
    findings, nodes = lint(artifact_of(family))
    assert [str(finding) for finding in findings] == []
    assert tuple(nodes) == parts_of(FAMILY_DEFAULTS[family])


def test_the_table_tells_support_types_and_age() -> None:
    assert len(table()) == 216
    assert not table()["MatMulInteger"].supported
    assert table()["MatMul"].types == {"FP32", "FP16", "BF16"}
    assert table()["Attention"].since == (10, 14)
    assert (table()["DFT"].supported, table()["DFT"].since) == (True, (11, 2))


def test_versions_are_read_and_unknown_ones_refused() -> None:
    assert parse_versions("10.13, 11.x") == ("10.13", "11.x")
    assert release("11.x") == (11, 0)
    with pytest.raises(UsageError, match="unknown TensorRT version '9.0'; there are: 10.13, 10.16, 11.x"):
        parse_versions("9.0")


def test_the_command_accepts_an_exported_artifact(artifact_of: ByFamily, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", str(artifact_of("klein")), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["tensorrt"] == ["10.13", "10.16", "11.x"]
    assert facts["nodes"]["transformer"] > 100


def test_the_command_names_what_would_be_refused(
    checkpoint_of: ByFamily, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(checkpoint_of("klein"), tmp_path / "a", ExportConfig(parts=("transformer",), attention="op"))
    assert main(["lint", str(tmp_path / "a"), "--tensorrt", "10.13"]) == 1
    captured = capsys.readouterr()
    assert "(Attention): the operator was added in TensorRT 10.14; export with --attention matmul" in captured.err
    assert main(["lint", str(tmp_path / "a"), "--tensorrt", "10.16,11.x"]) == 0
    assert main(["lint", str(tmp_path / "a"), "--tensorrt", "12"]) == 2
