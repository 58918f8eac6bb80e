"""Digests of the sample's exported and quantized graphs, which refactoring must not change.

    python -m tests.export.graph_digests --save    writes tests/export/graph_digests.json

Digests exclude names of tools and paths. Constants computed in floating point may differ in the last bit between CPUs,
so each graph has two digests: `form` (operators, names, shapes, types, integer constants) is the same everywhere, while
`bytes` (the file) and `weights` (the output of quantization) are the same on CPUs of one maker with equal vector
instructions: the mathematics libraries choose their kernels by both.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch

from benchmarks.sparse_quantized import synthetic_record
from export.artifact import ExportConfig, export
from kit.checkpoint import resolve
from kit.ports import QUANTIZED_PARTS
from kit.recipes import RECIPES
from quantize.apply.apply import apply
from quantize.apply.write import FILE

EXPECTED = Path(__file__).parent / "graph_digests.json"
EXPORTS = (("fp32", "matmul"), ("fp32", "op"), ("bf16", "matmul"), ("bf16", "op"))
QUANTIZED = tuple(name for name, recipe in RECIPES.items() if recipe.rules)
CPUINFO = Path("/proc/cpuinfo")


def form(path: Path) -> str:
    """Digest a graph without the values of its floating-point constants."""
    model = ir.load(path)
    lines = [f"opset {model.opset_imports}"]
    for value in (*model.graph.inputs, *model.graph.outputs):
        lines.append(f"port {value.name} {value.dtype} {value.shape}")
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None
        lines.append(f"constant {name} {tensor.dtype} {tensor.shape}{_value(tensor)}")
    for node in model.graph:
        attributes = {name: _plain(attribute) for name, attribute in sorted(node.attributes.items())}
        inputs, outputs = [v and v.name for v in node.inputs], [v.name for v in node.outputs]
        lines.append(f"{node.domain} {node.op_type} {node.name} {inputs} {outputs} {attributes}")
    return _sha("\n".join(lines).encode())


def _value(tensor: ir.TensorProtocol) -> str:
    if isinstance(tensor, ir.ExternalTensor):
        return f" at {tensor.location} {tensor.offset} {tensor.length}"
    return "" if tensor.dtype.is_floating_point() else f" {tensor.numpy().tolist()}"


def _plain(attribute: ir.Attr) -> Any:
    value = attribute.value
    if isinstance(value, ir.TensorProtocol):
        return f"{value.dtype} {value.shape}{_value(value)}"
    return "a float" if isinstance(value, float) else str(value)


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def digests(work: Path) -> dict[str, dict[str, str]]:
    """Export and quantize the sample in every way in `work`; returns the digests of each graph by name."""
    found: dict[str, dict[str, str]] = {}
    for dtype, attention in EXPORTS:
        out = work / f"{dtype}-{attention}"
        export(resolve("sample"), out, ExportConfig(dtype=dtype, attention=attention))  # type: ignore[arg-type]
        found |= exported(out, out.name)
        if attention == "matmul":
            found |= quantized(out, dtype, QUANTIZED, work)
    return found


def exported(artifact: Path, name: str) -> dict[str, dict[str, str]]:
    """Digest the graphs of an exported artifact."""
    return {
        f"{name}/{graph.parent.name}/{graph.name}": {"form": form(graph), "bytes": _sha(graph.read_bytes())}
        for graph in sorted(artifact.rglob("*.onnx"))
    }


def quantized(source: Path, dtype: str, recipes: Iterable[str], work: Path) -> dict[str, dict[str, str]]:
    """Quantize an exported artifact with each recipe in `work`; returns the digests of graphs and weights."""
    record, found = synthetic_record(source), {}
    for name in recipes:
        out = work / f"{dtype}-{name}"
        apply(source, out, RECIPES[name], record)
        for part in QUANTIZED_PARTS:
            graph = out / part / "model.onnx"
            found[f"{out.name}/{part}/{graph.name}"] = {
                "form": form(graph),
                "bytes": _sha(graph.read_bytes()),
                "weights": _sha((out / part / FILE).read_bytes()),
            }
    return found


def cpu() -> str:
    """Name what the last bits of constants depend on: vector instructions and the maker of the CPU."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    makers = [line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *makers[:1]])


def main() -> int:
    """Write or compare the digests; returns the exit code."""
    with tempfile.TemporaryDirectory() as work:
        found = digests(Path(work))
    if "--save" in sys.argv:
        known = json.loads(EXPECTED.read_text())["bytes"] if EXPECTED.is_file() else {}
        form_, bytes_ = {}, {}
        for graph, made in found.items():
            form_[graph] = made["form"]
            bytes_[graph] = [made["bytes"], made.get("weights", "")]
        if EXPECTED.is_file() and json.loads(EXPECTED.read_text())["form"] != form_:
            known = {}  # digests of other CPUs belong to older graphs
        content = {"form": form_, "bytes": {**known, cpu(): bytes_}}
        EXPECTED.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    wrong = differences(found, whole=True)
    print("\n".join(wrong) or f"{len(found)} graphs are unchanged")
    return 1 if wrong else 0


def differences(found: dict[str, dict[str, str]], whole: bool = False) -> list[str]:
    """List the graphs that differ from the expected ones; with `whole`, also those that are missing."""
    expected = json.loads(EXPECTED.read_text())
    bytes_ = expected["bytes"].get(cpu(), {})
    wrong = []
    for graph, made in found.items():
        if expected["form"].get(graph) != made["form"]:
            wrong.append(f"{graph}: form")
        if graph in bytes_ and bytes_[graph] != [made["bytes"], made.get("weights", "")]:
            wrong.append(f"{graph}: bytes")
    return wrong + ([f"{graph}: missing" for graph in expected["form"] if graph not in found] if whole else [])


if __name__ == "__main__":
    sys.exit(main())
