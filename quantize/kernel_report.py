"""Report which products of an artifact run in quantized kernels: read its graphs and what ONNX Runtime makes of them.

A quantized graph alone proves nothing: a runtime that does not fuse a DQ into its MatMul silently computes in high
precision, slower than before. So the optimized graph that ONNX Runtime runs is saved and read.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from export.node_report import KINDS
from kit.artifact import Manifest
from kit.dtypes import format_of_onnx, onnx_type
from kit.ports import PartName

FUSED = {"MatMulIntegerToFloat": "int8", "QLinearMatMul": "int8", "MatMulNBits": "weights"}  # ONNX Runtime's kernels
_QUANTIZED = tuple(onnx_type(word) for word in ("int8", "int4", "fp8"))


@dataclass(frozen=True)
class Product:
    """One MatMul with a weight [K, N]."""

    name: str
    inputs: int
    outputs: int
    weights: str | None  # number format of the codes, None in high precision
    activations: str | None
    once: bool = False  # a Gemm of the time embedding or the modulation, with one row per request instead of per token

    def flops(self, rows: int) -> int:
        return 2 * (2 if self.once else rows) * self.inputs * self.outputs


@dataclass(frozen=True)
class KernelReport:
    """The kernels of one part; shares are of the floating-point operations of all its products with weights."""

    part: PartName
    products: int
    quantized: Mapping[str, int]  # "int8 x int8" (weights x activations) -> how many
    flops_share: float  # with activations and weights both in low precision, by the graph
    casts_in_blocks: int
    fused: Mapping[str, int] = field(default_factory=dict)  # kernels that ONNX Runtime chose -> how many
    fallbacks: tuple[str, ...] = ()  # products quantized in the graph that ONNX Runtime runs in high precision
    running_share: float | None = None  # in integer kernels; None without the optimized graph


def report_kernels(folder: Path, manifest: Manifest, part: PartName, tokens: int, runtime: bool) -> KernelReport:
    """Report on the graph of a part and, with `runtime`, on the graph that ONNX Runtime's CPU provider optimizes it to.

    `tokens` is the number of rows of the products in a block. Raises ArtifactError if ONNX Runtime rejects the graph.
    """
    graph = folder / manifest.part(part).graph
    model = ir.load(graph)
    found = products(model)
    both = sum(p.flops(tokens) for p in found.values() if p.activations)
    total = sum(p.flops(tokens) for p in found.values())
    kinds = Counter(f"{p.weights} x {p.activations or 'high'}" for p in found.values() if p.weights)
    report = KernelReport(part, len(found), dict(kinds), both / total if total else 0.0, _casts(model))
    if not runtime:
        return report
    kernels = optimized(graph)
    fallbacks = tuple(sorted(name for name, p in found.items() if p.activations and kernels.get(name) not in FUSED))
    running = sum(p.flops(tokens) for name, p in found.items() if FUSED.get(kernels.get(name, "")) == "int8")
    return KernelReport(
        **{
            **report.__dict__,
            "fused": dict(Counter(kernels[name] for name in found if kernels.get(name) in FUSED)),
            "fallbacks": fallbacks,
            "running_share": running / total if total else 0.0,
        }
    )


def products(model: ir.Model) -> dict[str, Product]:
    """Return the products with a weight matrix in a graph, by node name."""
    found = {}
    for node in model.graph:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        x, w = node.inputs[0], node.inputs[1]
        shape, weights = _weight(w)
        if shape is None or node.name is None:
            continue
        transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0)
        k, n = (shape[1], shape[0]) if transposed else shape
        dq = x.producer() if x is not None else None
        codes = dq.inputs[0] if dq is not None and dq.op_type == "DequantizeLinear" else None
        activations = _word(codes.dtype) if codes is not None and codes.dtype in _QUANTIZED else None
        found[node.name] = Product(node.name, k, n, weights, activations, node.op_type == "Gemm")
    return found


def _weight(value: ir.Value | None) -> tuple[tuple[int, int] | None, str | None]:
    """Follow Casts and Transposes to a stored matrix; returns its shape as the product reads it, and its code type."""
    turned, codes = False, None
    while value is not None and not value.is_initializer():
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "Transpose", "DequantizeLinear"):
            return None, None
        turned ^= node.op_type == "Transpose"
        value = node.inputs[0]
        if node.op_type == "DequantizeLinear" and value is not None:
            codes = _word(value.dtype)
    if value is None or value.shape is None or len(value.shape) != 2:
        return None, None
    a, b = (int(size) for size in value.shape)
    return ((b, a) if turned else (a, b)), codes


def _word(dtype: ir.DataType | None) -> str:
    found = format_of_onnx(dtype)
    return str(dtype) if found is None else found.name


def _casts(model: ir.Model) -> int:
    """Count the Casts inside blocks, except those applied directly to a weight."""
    return sum(
        node.op_type == "Cast"
        and any(f"{kind}." in (node.name or "") for kind in KINDS)
        and not (node.inputs[0] is not None and node.inputs[0].is_initializer())
        for node in model.graph
    )


def optimized(graph: Path) -> dict[str, str]:
    """Return the operator that ONNX Runtime's CPU provider runs for each node of a graph, by node name.

    Raises ArtifactError if ONNX Runtime rejects the graph.
    """
    from runtimes.ort.engine import open_session, session_options
    from runtimes.ort.panels import whole

    with tempfile.TemporaryDirectory(dir=graph.parent.parent) as scratch:
        options = session_options()
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        open_session(graph, options)
        model = ir.load(options.optimized_model_filepath)
        return {whole(node.name): node.op_type for node in model.graph if node.name}
