"""The engine protocol, on every runtime that runs on a CPU; AOTInductor's test is in test_aoti, with its package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from kit.engine import Array
from kit.errors import ArtifactError, EngineError
from kit.ports import Port, Ports
from runtimes.ort.engine import OrtEngine
from tests.runtimes.bindings import load
from tests.runtimes.bindings.real import RTX, VERSIONS, interface
from tests.runtimes.bindings.runtime_world import inputs
from tests.runtimes.bindings.strict import StrictModule
from tests.runtimes.conformance import assert_conforms
from tests.runtimes.rtx import needs_rtx
from tests.runtimes.test_trt_engine import open_engine

PORTS = Ports(
    inputs=(Port("x", "fp32", ("batch", "tokens")), Port("ids", "i64", ("batch", "tokens"))),
    outputs=(Port("y", "fp32", ("batch", "tokens")), Port("copy", "fp32", ("batch", "tokens"))),
)


@pytest.fixture(params=[*VERSIONS, pytest.param(RTX, marks=needs_rtx)])
def trt(request: pytest.FixtureRequest) -> Iterator[StrictModule]:
    made = StrictModule(interface(request.param))
    with load.using(made):
        yield made


def graph(folder: Path) -> Path:
    """Write y = x + float(ids) and a second output that is the first input."""
    x = ir.val("x", ir.DataType.FLOAT, ["batch", "tokens"])
    ids = ir.val("ids", ir.DataType.INT64, ["batch", "tokens"])
    numbers = ir.node("Cast", [ids], {"to": int(ir.DataType.FLOAT)})
    total = ir.node("Add", [x, numbers.outputs[0]])
    copy = ir.node("Identity", [x])
    for node, name in ((total, "y"), (copy, "copy")):
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(["batch", "tokens"])
    nodes = [numbers, total, copy]
    outputs = [total.outputs[0], copy.outputs[0]]
    made = ir.Graph([x, ids], outputs, nodes=nodes, opset_imports={"": 21}, name="sum")
    path = folder / "model.onnx"
    ir.save(ir.Model(made, ir_version=10), path)
    return path


def values(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((2, 3)).astype(np.float32), "ids": rng.integers(0, 9, (2, 3))}


def test_onnx_runtime_keeps_the_protocol(tmp_path: Path) -> None:
    assert_conforms(OrtEngine(graph(tmp_path), PORTS), values)


def test_onnx_runtime_reports_inputs_that_do_not_fit(tmp_path: Path) -> None:
    engine = OrtEngine(graph(tmp_path), PORTS)
    with pytest.raises(EngineError, match="ids"):
        engine.run({"x": values(1)["x"]})
    with pytest.raises(EngineError, match="Invalid rank for input: x"):
        engine.run(values(1) | {"x": np.zeros(3, np.float32)})


def test_a_graph_or_a_provider_that_onnx_runtime_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match="broken.onnx: ONNX Runtime cannot load it"):
        OrtEngine(tmp_path / "broken.onnx", PORTS)
    with pytest.raises(ArtifactError, match="ONNX Runtime has no NoProvider here; it has: .*CPUExecutionProvider"):
        OrtEngine(graph(tmp_path), PORTS, provider="NoProvider")


@pytest.mark.parametrize("rows", [2, 5], ids=["one call", "split batch"])
@pytest.mark.parametrize("graphs", [True, False])
def test_tensorrt_keeps_the_protocol(trt: StrictModule, tmp_path: Path, rows: int, graphs: bool) -> None:
    engine, _ = open_engine(trt, tmp_path, graphs)
    assert_conforms(engine, lambda seed: inputs(rows, 4, seed))


class Broken:
    """An engine over another that breaks one rule."""

    def __init__(self, rule: str) -> None:
        self.ports = PORTS
        self.rule = rule
        self.kept: dict[int, Array] = {}
        self.output = np.zeros((2, 3), np.float32)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        x = inputs["x"]
        if self.rule == "changes its inputs" and x.flags.writeable:
            x[...] = 0
        if self.rule == "keeps writeable arrays":
            x = self.kept.setdefault(id(inputs["x"]), x.copy())
        if self.rule == "returns the same memory":
            self.output[...] = x
            return {"y": self.output}
        return {"y": x.copy()}


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("changes its inputs", "the engine changed its inputs"),
        ("keeps writeable arrays", "a writeable array that changed was not read again"),
        ("returns the same memory", "an output changed when the engine ran again"),
    ],
)
def test_an_engine_that_breaks_a_rule_is_found(rule: str, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_conforms(Broken(rule), values)
