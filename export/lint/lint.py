"""Check every node of every graph of an artifact against TensorRT's operator table, without TensorRT or a GPU.

A failing build takes minutes and reports only the name of a layer; this reports the node, the rule and the remedy in
seconds. It cannot decide what depends on kernels, such as whether a fused attention exists for a shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from export.lint.operators import OPSETS, VERSIONS, Operator, TensorRT, release, table
from export.lint.quantized import QUANTIZED_RULES
from export.lint.rules import EIGHT_BIT, QUANTIZED, RULES, Complaint, Rule
from kit.artifact import verify
from kit.dtypes import format_of_onnx

_ALL_RULES: Mapping[str, tuple[Rule, ...]] = {**RULES, **QUANTIZED_RULES}
_MAIN = {"Where": "T"}  # the type variable that the table refers to, if it is not that of the first input
_Q_DQ = ("QuantizeLinear", "DequantizeLinear")  # their operands have separate rules


@dataclass(frozen=True)
class Finding:
    """One node that TensorRT would reject, with the rule it breaks and the remedy."""

    graph: str
    node: str
    op: str
    rule: str
    remedy: str
    versions: tuple[TensorRT, ...]

    def __str__(self) -> str:
        return (
            f"{self.graph}: {self.node} ({self.op}): {self.rule}; {self.remedy} [TensorRT {', '.join(self.versions)}]"
        )


def lint(artifact: Path, versions: Sequence[TensorRT] = VERSIONS) -> tuple[list[Finding], dict[str, int]]:
    """Lint every graph of an artifact; returns the findings and the number of nodes by part."""
    manifest = verify(artifact, kinds=("onnx", "quantized"))
    findings: list[Finding] = []
    nodes: dict[str, int] = {}
    for part, record in manifest.parts.items():
        model = load(artifact / record.graph)
        nodes[part] = len(model.graph)
        findings += lint_model(model, part, versions)
    return findings, nodes


def load(path: Path) -> ir.Model:
    """Load a graph and infer types and shapes; weights are not read."""
    proto = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False), data_prop=True)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def lint_model(model: ir.Model, name: str, versions: Sequence[TensorRT] = VERSIONS) -> list[Finding]:
    """Lint one graph."""
    chosen = tuple(versions)
    opset = model.opset_imports.get("", 0)
    findings = []
    if opset not in OPSETS:
        rule = f"opset {opset} is outside {OPSETS.start} to {OPSETS.stop - 1}"
        findings.append(Finding(name, "the graph", "opset", rule, "export with opset 23", chosen))
    for node in model.graph.all_nodes():
        for (rule, remedy), concerned in _complaints(node, chosen):
            findings.append(Finding(name, node.name or "unnamed", node.op_type, rule, remedy, concerned))
    return findings


def _complaints(node: ir.Node, versions: tuple[TensorRT, ...]) -> Iterator[tuple[Complaint, tuple[TensorRT, ...]]]:
    if node.domain not in ("", "ai.onnx"):
        yield (f"domain {node.domain!r} is not standard ONNX", "export it with standard operators"), versions
        return
    row = table().get(node.op_type)
    if row is None or not row.supported:
        yield ("the operator is not supported", "replace it before the export"), versions
        return
    older = tuple(v for v in versions if release(v) < row.since)
    if older:
        since = ".".join(map(str, row.since))
        yield (f"the operator was added in TensorRT {since}", _instead(node.op_type)), older
    for complaint in _types(node, row):
        yield complaint, versions
    for rule in _ALL_RULES.get(node.op_type, ()):
        for complaint in rule(node):
            yield complaint, versions


def _instead(op: str) -> str:
    return "export with --attention matmul" if op == "Attention" else "export it as older operators"


def _types(node: ir.Node, row: Operator) -> Iterator[Complaint]:
    """Check element types: no DOUBLE, quantized types only around Q/DQ, the rest according to the table.

    The table refers to the operands that share the operator's main type variable. Indices, shapes and conditions have
    their own types, which the ONNX checker has already verified.
    """
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype == ir.DataType.DOUBLE:
            yield f"{value.name} is DOUBLE, for which TensorRT has no kernels", "compute it in FP32"
    if node.op_type in _Q_DQ:
        return
    for value in node.inputs:
        if value is None or value.dtype not in QUANTIZED:
            continue
        if value.dtype in EIGHT_BIT:
            yield f"{value.name} is {value.dtype} outside QuantizeLinear and DequantizeLinear", "dequantize it first"
        elif not (value.dtype == ir.DataType.UINT8 and value.is_graph_input()):
            yield f"{value.name} is {value.dtype}; TensorRT supports UINT8 only as a graph input", "cast it first"
    operands = _operands(node)
    for values in operands.values():
        types = {value.dtype: value for value in values if value.dtype is not None}
        if len(types) > 1:
            mixed = " and ".join(f"{value.name} is {dtype}" for dtype, value in types.items())
            yield f"{mixed}; a strongly typed network requires one type", "cast one of them"
    for value in operands.get(_MAIN.get(node.op_type) or next(iter(operands), ""), []):
        found = format_of_onnx(value.dtype)
        name = found.title if found is not None else None if value.dtype is None else str(value.dtype)
        if name is None or value.dtype in QUANTIZED or value.dtype == ir.DataType.DOUBLE:
            continue
        if row.types and name not in row.types:
            yield f"{value.name} is {name}; the operator takes {', '.join(sorted(row.types))}", "cast it first"
    for output in node.outputs:
        if output.dtype == ir.DataType.UINT8 and not output.is_graph_output():
            yield f"{output.name} is UINT8; TensorRT supports UINT8 only as a graph output", "use a wider type"


def _operands(node: ir.Node) -> dict[str, list[ir.Value]]:
    """Group the inputs of a node by type variable of its operator, starting with the first input's; the outputs if it
    has no inputs. Inputs that may each have a different type are left out.
    """
    version = node.graph.opset_imports[""] if node.graph is not None and node.graph.opset_imports else None
    schema = onnx.defs.get_schema(node.op_type, version or onnx.defs.onnx_opset_version(), "")
    if not schema.inputs:
        return {"": [value for value in node.outputs if value is not None]}
    sorted_values: dict[str, list[ir.Value]] = {}
    for index, value in enumerate(node.inputs):
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        if value is not None and formal.is_homogeneous:
            sorted_values.setdefault(formal.type_str, []).append(value)
    return sorted_values
