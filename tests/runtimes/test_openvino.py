"""OpenVINO as an engine, against ONNX Runtime on the same graph."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kit.artifact import Manifest
from kit.engine import Array
from kit.errors import ArtifactError, EngineError, UsageError
from kit.hardware import cpu
from kit.variants import VARIANTS
from runtimes.open import open_parts
from runtimes.openvino.engine import OpenVinoEngine
from runtimes.ort.engine import OrtEngine
from tests.runtimes.conformance import assert_conforms
from tests.runtimes.test_engine_protocol import PORTS, graph, values

pytest.importorskip("openvino", reason="needs the extra openvino")


def assert_close(found: Array, wanted: Array, tolerance: float) -> None:
    np.testing.assert_allclose(found.astype(np.float64), wanted.astype(np.float64), rtol=tolerance, atol=tolerance)


def test_openvino_keeps_the_protocol(tmp_path: Path) -> None:
    assert_conforms(OpenVinoEngine(graph(tmp_path), PORTS), values)


def test_openvino_computes_what_onnx_runtime_computes(tmp_path: Path) -> None:
    path = graph(tmp_path)
    ours, theirs = (engine.run(values(3)) for engine in (OpenVinoEngine(path, PORTS), OrtEngine(path, PORTS)))
    for name, expected in theirs.items():
        assert ours[name].dtype == expected.dtype
        assert_close(ours[name], expected, 1e-6)


def test_openvino_reports_inputs_that_do_not_fit(tmp_path: Path) -> None:
    engine = OpenVinoEngine(graph(tmp_path), PORTS)
    with pytest.raises(EngineError, match="input ids is missing; given: x"):
        engine.run({"x": values(1)["x"]})
    with pytest.raises(EngineError, match="input x is float64, its port is fp32"):
        engine.run(values(1) | {"x": np.zeros((2, 3))})
    with pytest.raises(EngineError, match=r"input x has shape \[3\], its port is"):
        engine.run(values(1) | {"x": np.zeros(3, np.float32)})
    with pytest.raises(EngineError):
        engine.run(values(1) | {"x": np.zeros((2, 5), np.float32)})  # ids has 3 columns


def test_a_graph_that_openvino_cannot_load_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(ArtifactError, match=r"broken\.onnx: OpenVINO cannot load it"):
        OpenVinoEngine(tmp_path / "broken.onnx", PORTS)


def test_a_graph_with_bf16_ports_is_rejected(tmp_path: Path) -> None:
    ports = replace(PORTS, outputs=(replace(PORTS.outputs[0], dtype="bf16"),))
    with pytest.raises(ArtifactError, match="port y is bf16; export with --dtype fp32"):
        OpenVinoEngine(graph(tmp_path), ports)


def test_without_openvino_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UsageError, match=r"pip install 'flux2-deploy\[openvino\]'"):
        OpenVinoEngine(graph(tmp_path), PORTS)


def test_a_plan_is_not_run_by_openvino(tmp_path: Path) -> None:
    compiled = Manifest("engine", VARIANTS["klein-4b"], "bf16", "bf16", {}, {})
    with pytest.raises(UsageError, match="is of kind engine, which openvino-fp32 cannot run; give an ONNX artifact"):
        open_parts(tmp_path, compiled, (), runtime="openvino-fp32")


def test_bf16_is_rejected_on_a_cpu_without_it_and_rounds_elsewhere(tmp_path: Path) -> None:
    path = graph(tmp_path)
    if not {"avx512_bf16", "amx_bf16"} & set(cpu().features):
        with pytest.raises(UsageError, match="no bf16 on this CPU; use the runtime openvino-fp32"):
            OpenVinoEngine(path, PORTS, compute="bf16")
        return
    given = values(4)
    found = OpenVinoEngine(path, PORTS, compute="bf16").run(given)["y"]
    assert_close(found, np.add(given["x"].astype(np.float32), given["ids"].astype(np.float32)), 2**-7)
