"""Int8 products on a CPU that were tried and not kept: python -m benchmarks.cpu_trials; see docs/log.md.

Each trial compares one change with what the kit does today, in turn, in one run. The graphs are one or two products of
random codes, at the size of a block of klein-4b; what is compared is the runtime, so their values do not matter.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks.machine import describe
from benchmarks.measure import measure

ROWS, DEPTH, COLUMNS = 1536, 3072, 9216  # tokens, width, and a projection of klein-4b
ROUNDS = 5
RUNS = 9  # of one fast product in a process; the quickest counts, since other work only ever adds
PANEL = 1024  # columns of a panel


def main() -> int:
    """Run every trial, or the one piece of work that the first argument names; returns the exit code."""
    if sys.argv[1:2] == ["--piece"]:
        print(json.dumps(PIECES[sys.argv[2]]()))
        return 0
    facts = {trial.__name__: trial() for trial in (signed_activations, slice_per_panel, huge_pages, shared_quantize)}
    print(json.dumps({**facts, "command": "python -m benchmarks.cpu_trials", "machine": describe()}, indent=1))
    return 0


def signed_activations() -> dict[str, float]:
    """Time MatMulIntegerToFloat with int8 and with uint8 activations, in seconds."""
    found = _in_turn({"uint8": lambda: piece("uint8")["seconds"], "int8": lambda: piece("int8")["seconds"]}, 3)
    return {**found, "ratio": found["int8"] / found["uint8"]}


def slice_per_panel() -> dict[str, float]:
    """Compare the memory that loading a weight takes at its peak, cut by one Split and by a Slice per panel, in MB."""
    return _in_turn({"split": lambda: piece("split")["peak_mb"], "slice": lambda: piece("slice")["peak_mb"]}, 3)


def huge_pages() -> dict[str, float]:
    """Time the uint8 product with transparent huge pages asked for by glibc, and without, in seconds."""
    asked = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    found = _in_turn(
        {"without": lambda: piece("uint8")["seconds"], "huge_pages": lambda: piece("uint8", asked)["seconds"]}
    )
    return {**found, "ratio": found["without"] / found["huge_pages"]}


def shared_quantize() -> dict[str, int]:
    """Count which of two products ONNX Runtime fuses: both behind one QuantizeLinear, and each behind its own."""
    return {"shared": piece("shared")["fused"], "own": piece("own")["fused"]}


def piece(name: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Do one piece of work in a process of its own and return its facts."""
    kept = dict(os.environ)
    os.environ.update(environment or {})
    try:
        done = measure([sys.executable, "-m", "benchmarks.cpu_trials", "--piece", name])
    finally:
        os.environ.clear()
        os.environ.update(kept)
    return dict(json.loads(done.stdout))


def _in_turn(works: dict[str, Callable[[], float]], rounds: int = ROUNDS) -> dict[str, float]:
    """Run works in turn; returns the median of each."""
    seen = [{name: work() for name, work in works.items()} for _ in range(rounds)]
    return {name: statistics.median(found[name] for found in seen) for name in works}


def _session(nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, Any], saved: str = "") -> Any:
    """Open a graph; returns the session and the MB that loading took at its peak."""
    import onnxruntime as ort

    initializers = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "trial", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if saved:
        options.optimized_model_filepath = saved
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    if saved:
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]), 0.0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file, save_as_external_data=True, location="weights", size_threshold=1024)
        del model, graph, initializers
        weights.clear()
        before = _memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return session, _memory("VmHWM") - before


def _memory(which: str) -> float:
    """Return a line of Linux's account of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{which}:")) * 1024 / 1e6


def _codes(columns: int = COLUMNS) -> Any:
    return np.random.default_rng(0).integers(-127, 128, (DEPTH, columns), np.int8)


def _product(kind: str) -> dict[str, float]:
    """Time one product that is in the graph as the runtime's own operator."""
    dtype, zero = (np.uint8, 128) if kind == "uint8" else (np.int8, 0)
    code = TensorProto.UINT8 if kind == "uint8" else TensorProto.INT8
    node = helper.make_node("MatMulIntegerToFloat", ["x", "w", "xs", "ws", "xz"], ["y"], domain="com.microsoft")
    scales = {"xs": np.float32(0.02), "ws": np.full(COLUMNS, 0.01, np.float32), "xz": np.array(zero, dtype)}
    weights = {"w": _codes(), **{name: np.asarray(value) for name, value in scales.items()}}
    inputs = [helper.make_tensor_value_info("x", code, [ROWS, DEPTH])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])]
    session, _ = _session([node], inputs, outputs, weights)
    x = np.random.default_rng(1).integers(0, 100, (ROWS, DEPTH)).astype(dtype)
    session.run(None, {"x": x})
    took = []
    for _ in range(RUNS if kind == "uint8" else 1):
        begin = time.perf_counter()
        session.run(None, {"x": x})
        took.append(time.perf_counter() - begin)
    return {"seconds": min(took)}


def _cut(operator: str) -> dict[str, float]:
    """Load products of the panels of one weight, which one Split or a Slice per panel cuts."""
    starts = list(range(0, 4 * COLUMNS, PANEL))
    nodes, weights = [], {"w": _codes(4 * COLUMNS)}
    if operator == "split":
        weights["sizes"] = np.full(len(starts), PANEL, np.int64)
        nodes = [helper.make_node("Split", ["w", "sizes"], [f"w{at}" for at in starts], axis=1)]
    for at in starts:
        if operator == "slice":
            weights |= {f"from{at}": np.array([at]), f"to{at}": np.array([at + PANEL]), "axes": np.array([1])}
            nodes.append(helper.make_node("Slice", ["w", f"from{at}", f"to{at}", "axes"], [f"w{at}"]))
        nodes.append(helper.make_node("MatMulInteger", ["x", f"w{at}", "xz"], [f"y{at}"]))
    weights["xz"] = np.array(128, np.uint8)
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, DEPTH])]
    outputs = [helper.make_tensor_value_info(f"y{at}", TensorProto.INT32, [1, PANEL]) for at in starts]
    return {"peak_mb": _session(nodes, inputs, outputs, weights)[1]}


def _fused(shared: bool) -> dict[str, int]:
    """Count fused products of a graph in which two products read one activation."""
    width = 256
    weights: dict[str, Any] = {"s0": np.float32(0.02), "s1": np.float32(0.03), "z": np.array(0, np.int8)}
    nodes = []
    for i in range(2):
        q = "0" if shared else str(i)
        weights |= {f"w{i}": _codes(width)[:width], f"ws{i}": np.full(width, 0.01, np.float32)}
        if q == str(i):
            nodes.append(helper.make_node("QuantizeLinear", ["x", f"s{q}", "z"], [f"q{q}"]))
        nodes += [
            helper.make_node("DequantizeLinear", [f"q{q}", f"s{q}", "z"], [f"d{i}"]),
            helper.make_node("DequantizeLinear", [f"w{i}", f"ws{i}"], [f"dw{i}"], axis=1),
            helper.make_node("MatMul", [f"d{i}", f"dw{i}"], [f"y{i}"]),
        ]
    weights = {name: np.asarray(value) for name, value in weights.items()}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [8, width])]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [8, width]) for i in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "optimized.onnx"
        _session(nodes, inputs, outputs, weights, str(saved))
        kinds = [node.op_type for node in onnx.load(saved).graph.node]
    return {"fused": sum(kind in ("MatMulIntegerToFloat", "QLinearMatMul") for kind in kinds)}


PIECES: dict[str, Callable[[], dict[str, Any]]] = {
    "uint8": lambda: _product("uint8"),
    "int8": lambda: _product("int8"),
    "split": lambda: _cut("split"),
    "slice": lambda: _cut("slice"),
    "shared": lambda: _fused(True),
    "own": lambda: _fused(False),
}


if __name__ == "__main__":
    sys.exit(main())
