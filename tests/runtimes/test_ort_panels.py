"""Wide int8 products cut into panels: the same bits, and a report that still finds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from kit.artifact import read_manifest
from kit.hardware import Cpu, cpu
from quantize.kernel_report import report_kernels
from runtimes.ort import engine
from runtimes.ort.engine import FOLDER, OrtEngine, session_options
from runtimes.ort.panels import cut, find_products, in_panels, whole

QuantizedOf = Callable[[str], Path]
vnni = pytest.mark.skipif(not cpu().int8, reason="this CPU multiplies uint8 with int8 in 16 bits, and rounds")


@pytest.fixture(scope="module")
def int8(quantized_of: QuantizedOf) -> Path:
    return quantized_of("int8") / "transformer" / "model.onnx"


def feeds(session: ort.InferenceSession, rows: int) -> dict[str, npt.NDArray[Any]]:
    rng = np.random.default_rng(1)
    types: dict[str, Any] = {"tensor(float)": np.float32, "tensor(int64)": np.int64}
    free = {0: rows, 1: 24}  # axes without a size: rows and image tokens
    made = {}
    for port in session.get_inputs():
        shape = [size if isinstance(size, int) else free[axis] for axis, size in enumerate(port.shape)]
        draw = rng.standard_normal(shape) if "float" in port.type else rng.integers(0, 4, shape)
        made[port.name] = draw.astype(types[port.type])
    return made


def in_memory(model: bytes | None, graph: Path) -> ort.InferenceSession:
    assert model is not None
    options = session_options()
    options.add_session_config_entry(FOLDER, str(graph.parent))
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@vnni
@pytest.mark.parametrize("columns", [32, 80, 200])
@pytest.mark.parametrize("rows", [1, 3])
def test_panels_give_the_same_bits(int8: Path, columns: int, rows: int) -> None:
    before = ort.InferenceSession(int8, session_options(), providers=["CPUExecutionProvider"])
    after = in_memory(in_panels(int8, columns), int8)
    given = feeds(before, rows)
    np.testing.assert_array_equal(before.run(None, given)[0], after.run(None, given)[0])


def test_every_wide_product_is_cut_and_no_copy_is_made_twice(int8: Path) -> None:
    model = ir.load(int8)
    columns = 40
    wide = {product.node.name for product in find_products(model) if product.columns > columns}
    assert len(wide) == 24
    assert cut(model, columns) == 24
    panels = [node for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
    assert {whole(node.name or "") for node in panels} == wide
    read = {node.op_type for panel in panels for node, _ in panel.outputs[0].uses()}
    assert not read & {"Split", "Slice"}
    assert not [
        node.name for node in model.graph if node.op_type in ("MatMul", "DequantizeLinear") and node.name in wide
    ]


def test_swiglu_and_the_next_quantization_stay_in_panels(int8: Path) -> None:
    """A value is joined as bytes where the next product reads it, and as floats where attention does."""
    model = ir.load(int8)
    cut(model, 40)
    block = "single_transformer_blocks.1"
    joined = [
        node for node in model.graph if (node.name or "").startswith(block) and (node.name or "").endswith("/joined")
    ]
    kinds = sorted(str(node.outputs[0].dtype) for node in joined)
    assert kinds == ["FLOAT"] * 4 + ["UINT8"], [node.name for node in joined]  # q, k, v, the block's output; its input


def test_a_narrow_product_stays(int8: Path) -> None:
    assert in_panels(int8, 100_000) is None


@pytest.mark.parametrize("recipe", ["fp8", "int8-weights", "int4-weights"])
def test_other_number_formats_stay(quantized_of: QuantizedOf, recipe: str) -> None:
    assert in_panels(quantized_of(recipe) / "transformer" / "model.onnx", 32) is None


def test_a_scale_for_the_whole_weight_serves_every_panel(tmp_path: Path) -> None:
    graph, weight = tmp_path / "model.onnx", np.arange(-64, 64, dtype=np.int8).reshape(4, 32)
    ir.save(one_product(weight, np.array(0.5, np.float32)), graph)
    model = in_panels(graph, 10)
    x = np.array([[1, -2, 3, 0]], np.float32)
    found = in_memory(model, graph).run(None, {"x": x})[0]
    np.testing.assert_allclose(found, x @ (weight * 0.5), rtol=1e-6)


def one_product(weight: npt.NDArray[np.int8], scale: npt.NDArray[np.float32]) -> ir.Model:
    """Return x [B, 4] times a weight with one scale, as a graph whose output is the product itself."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", 4]))
    stored: dict[str, npt.NDArray[Any]] = {
        "w": weight,
        "s": scale,
        "a": np.array(0.25, np.float32),
        "z": np.array(0, np.int8),
    }
    values = {}
    for name, array in stored.items():
        tensor = ir.Tensor(array, name=name)
        kind = ir.TensorType(tensor.dtype)
        values[name] = ir.Value(name=name, type=kind, shape=ir.Shape(array.shape), const_value=tensor)
    q = ir.node("QuantizeLinear", [x, values["a"], values["z"]], name="q")
    q.outputs[0].type = ir.TensorType(ir.DataType.INT8)
    d = ir.node("DequantizeLinear", [q.outputs[0], values["a"], values["z"]], name="d")
    w = ir.node("DequantizeLinear", [values["w"], values["s"]], name="dw")
    y = ir.node("MatMul", [d.outputs[0], w.outputs[0]], name="product/MatMul")
    y.outputs[0].name = "y"
    y.outputs[0].type, y.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["B", weight.shape[1]])
    graph = ir.Graph([x], y.outputs, nodes=[q, d, w, y], initializers=list(values.values()), opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


@pytest.mark.parametrize(("features", "panels"), [(("avx512_vnni",), 24), (("avx2",), 0)])
def test_large_parts_are_cut_where_the_cpu_multiplies_uint8_exactly(
    int8: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, features: tuple[str, ...], panels: int
) -> None:
    monkeypatch.setattr(engine, "LARGE", 0)
    monkeypatch.setattr(engine, "cpu", lambda: Cpu("made up", 2, features))
    monkeypatch.setattr(engine, "PANEL_COLUMNS", 40)
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
    engine.open_session(int8, options)
    names = [node.name or "" for node in ir.load(tmp_path / "optimized.onnx").graph]
    assert len({whole(name) for name in names if "/MatMul/panel_" in name}) == panels


@vnni
def test_a_report_counts_a_product_in_panels_once(quantized_of: QuantizedOf, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantized_of("int8")
    manifest = read_manifest(folder)
    plain = report_kernels(folder, manifest, "transformer", 100, runtime=True)
    monkeypatch.setattr(engine, "LARGE", 0)
    monkeypatch.setattr(engine, "PANEL_COLUMNS", 40)
    in_parts = report_kernels(folder, manifest, "transformer", 100, runtime=True)
    assert in_parts == plain
    assert in_parts.fused == {"MatMulIntegerToFloat": 24}
    assert in_parts.fallbacks == ()


@vnni
def test_an_engine_runs_in_panels_and_without(int8: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "LARGE", 0)
    monkeypatch.setattr(engine, "PANEL_COLUMNS", 40)
    ports = read_manifest(int8.parent.parent).part("transformer").ports
    cut_up, as_it_is = OrtEngine(int8, ports), OrtEngine(int8, ports, panels=False)
    given = feeds(as_it_is.session, 2)
    (name,) = as_it_is.run(given)
    np.testing.assert_array_equal(cut_up.run(given)[name], as_it_is.run(given)[name])
