"""ONNX Runtime's GPU providers: options held to the real libraries, bound tensors, and nothing silently on the CPU.

No GPU runs here. Binding and the assignment of nodes are tested with the CPU provider; loading the others with the real
wheels, which must fail with the reason.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from kit.cuda_device import CudaDevice
from kit.engine import Array
from kit.errors import ArtifactError, EngineError, UsageError
from kit.ports import Port, Ports
from kit.providers import PROVIDERS, provider
from runtimes.ort import bound
from runtimes.ort.assignment import Assignment, shape_nodes
from runtimes.ort.bound import BoundEngine
from runtimes.ort.providers import Plan, cache_folder, merged, next_options, options, register
from runtimes.trt.profiles import AxisRange, Profile, Sizing, derive
from tests.runtimes import ort_gpu, rtx
from tests.runtimes.bindings.runtime_world import CpuDevice
from tests.runtimes.conformance import assert_conforms
from tests.runtimes.test_engine_protocol import PORTS, graph, values

SIZES = Profile("all", {"batch": AxisRange(1, 1, 4), "tokens": AxisRange(1, 3, 8)})
BF16 = Ports((Port("x", "bf16", ("batch", "tokens", 2)),), (Port("y", "bf16", ("batch", "tokens", 2)),))
L4 = CudaDevice("NVIDIA L4", (8, 9), 2**34, "580.65.06")


def plan(tmp_path: Path, **changed: Any) -> Plan:
    return replace(Plan(SIZES, tmp_path / "cache", 10**9), **changed)


def names_of(name: str, tmp_path: Path) -> set[str]:
    return set(options(PROVIDERS[name], BF16, plan(tmp_path), 77))


def has(library: bytes, option: str) -> bool:
    return option.encode() + b"\0" in library


@ort_gpu.needs_ort_gpu
@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_every_option_is_one_of_the_real_library(name: str, tmp_path: Path) -> None:
    library = ort_gpu.library(name)
    assert [option for option in sorted(names_of(name, tmp_path)) if not has(library, option)] == []
    for _, given in next_options(PROVIDERS[name], plan(tmp_path), 77):
        assert [option for option in given if not has(ort_gpu.library("cuda"), option)] == []
    assert not has(library, "trt_profile_minimum_shapes")
    assert not has(library, "gpu_memory_limit"), "a misspelled option is found"


@rtx.needs_rtx
def test_every_option_of_tensorrt_for_rtx_is_one_of_its_header(tmp_path: Path) -> None:
    folder = rtx.FOLDER / "onnxruntime_ep_nv_tensorrt_rtx"
    header = (folder / "tensorrt_rtx_provider_options.h").read_text()
    for option in (*names_of("tensorrt-rtx", tmp_path), PROVIDERS["tensorrt-rtx"].graph_id):
        assert f'"{option}"' in header, option
    assert PROVIDERS["tensorrt-rtx"].targets == ("8.6", "8.9", "12.0"), "those of kTargetSMValues that the kit knows"
    for target in PROVIDERS["tensorrt-rtx"].targets:
        assert f'"sm{target.replace(".", "")}"' in header


def test_shapes_memory_streams_and_graphs_become_options(tmp_path: Path) -> None:
    made = options(PROVIDERS["tensorrt"], PORTS, plan(tmp_path), 77)
    assert made["trt_profile_min_shapes"] == "x:1x1,ids:1x1"
    assert made["trt_profile_opt_shapes"] == "x:1x3,ids:1x3"
    assert made["trt_profile_max_shapes"] == "x:4x8,ids:4x8"
    assert made["trt_engine_cache_path"] == str(tmp_path / "cache")
    assert made["user_compute_stream"] == "77"
    assert made["trt_bf16_enable"] == "0"
    assert options(PROVIDERS["tensorrt"], BF16, plan(tmp_path), 77)["trt_bf16_enable"] == "1"
    rest = dict(next_options(PROVIDERS["tensorrt"], plan(tmp_path), 77))
    assert rest["CUDAExecutionProvider"]["enable_cuda_graph"] == "0"
    assert rest["CUDAExecutionProvider"]["gpu_mem_limit"] == "1000000000"
    made = options(PROVIDERS["tensorrt-rtx"], PORTS, plan(tmp_path, graphs=False), 77)
    assert made["nv_profile_max_shapes"] == "x:4x8;ids:4x8"
    assert made["enable_cuda_graph"] == "0"
    assert "gpu_mem_limit" not in options(PROVIDERS["cuda"], PORTS, plan(tmp_path, memory_limit=None), 77)
    with pytest.raises(UsageError, match="unknown provider 'rocm'; there are: cpu, cuda, tensorrt, tensorrt-rtx"):
        provider("rocm")


def test_one_profile_covers_all_images_with_the_batch_that_all_accept() -> None:
    ports = Ports((Port("x", "bf16", ("batch", "image_tokens", 2)),), ())
    made = merged(derive(ports, Sizing((1024, 2048), 16, 0, 64)))
    assert dict(made.axes) == {"batch": AxisRange(1, 1, 4), "image_tokens": AxisRange(16, 4096, 16384)}


def test_compiled_engines_are_kept_by_graph_weights_card_driver_and_version(tmp_path: Path) -> None:
    path = graph(tmp_path)
    weights = tmp_path / "model.safetensors"
    header = b"{}      "
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    found = {cache_folder(path, L4, "1.31.1"), cache_folder(path, L4, "1.32.0")}
    found |= {cache_folder(path, replace(L4, driver="590.1"), "1.31.1")}
    found |= {cache_folder(path, replace(L4, title="NVIDIA L40S"), "1.31.1")}
    os.utime(weights, ns=(0, 1))  # a fine-tune has the same header and size
    found |= {cache_folder(path, L4, "1.31.1")}
    assert len(found) == 5
    assert {folder.parent for folder in found} == {tmp_path}


# --- the engine ------------------------------------------------------------------------------------------------------


def engine(tmp_path: Path) -> tuple[BoundEngine, CpuDevice]:
    device = CpuDevice()
    return BoundEngine(graph(tmp_path), PORTS, PROVIDERS["cpu"], plan(tmp_path), device, "cpu"), device


@pytest.mark.parametrize("rows", [2, 4])
def test_bound_tensors_keep_the_engine_protocol(tmp_path: Path, rows: int) -> None:
    def make(seed: int) -> dict[str, Array]:
        given = values(seed)
        return {name: np.concatenate([array] * (rows // 2)) for name, array in given.items()}

    assert_conforms(engine(tmp_path)[0], make)


def test_a_batch_beyond_the_profile_is_split_and_other_sizes_are_rejected(tmp_path: Path) -> None:
    made, _ = engine(tmp_path)
    given = {name: np.concatenate([array] * 3)[:5] for name, array in values(1).items()}
    assert np.array_equal(made.run(given)["y"], given["x"] + given["ids"].astype(np.float32))
    assert {key[0] for key in made._prepared} == {(4, 3), (1, 3)}
    with pytest.raises(EngineError, match="no profile of the engine accepts tokens 9"):
        made.run({"x": np.zeros((1, 9), np.float32), "ids": np.zeros((1, 9), np.int64)})
    with pytest.raises(EngineError, match="input ids is missing"):
        made.run({"x": given["x"]})


def test_a_read_only_input_stays_on_the_device_from_call_to_call(tmp_path: Path) -> None:
    made, device = engine(tmp_path)
    given = values(1)
    given["ids"].flags.writeable = False
    for seed in (1, 2, 3):
        made.run({"x": values(seed)["x"], "ids": given["ids"]})
    assert len(device.uploads) == 4, "ids once, x three times"


class Session:
    """A session that records which CUDA graphs are run and released."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.runs: list[str] = []
        self.released: list[int] = []

    def io_binding(self) -> Any:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: Any, run_options: Any) -> None:
        self.runs.append(run_options.get_run_config_entry("gpu_graph_id"))
        self.session.run_with_iobinding(binding)

    def release_captured_graph(self, number: int) -> None:
        self.released.append(number)


def test_each_shape_has_a_graph_which_is_released_with_its_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = engine(tmp_path)
    monkeypatch.setattr(bound, "KEPT_SHAPES", 2)
    made._row = replace(made._row, graph_id="gpu_graph_id")
    made.session = session = Session(made.session)
    for tokens in (1, 2, 1, 3, 2):
        made.run({"x": np.zeros((1, tokens), np.float32), "ids": np.zeros((1, tokens), np.int64)})
    assert session.runs == ["1", "2", "1", "3", "4"]
    assert session.released == [2, 1]


def test_a_failure_of_the_provider_is_an_engine_error_and_the_next_call_works(tmp_path: Path) -> None:
    made, device = engine(tmp_path)
    real = device.empty

    def full(shape: tuple[int, ...], dtype: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    device.empty = full  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="CPUExecutionProvider failed: CUDA out of memory"):
        made.run(values(1))
    device.empty = real  # type: ignore[method-assign]
    assert made.run(values(1))


# --- nothing silently on the CPU -------------------------------------------------------------------------------------


def test_nodes_that_compute_shapes_are_told_apart() -> None:
    x = ir.val("x", ir.DataType.FLOAT, ["batch", "tokens"])
    shape = ir.node("Shape", [x], name="shape")
    two = ir.val("two", ir.DataType.INT64, [1], const_value=ir.tensor(np.array([2], np.int64), name="two"))
    double = ir.node("Mul", [shape.outputs[0], two], name="double")
    filled = ir.node("ConstantOfShape", [double.outputs[0]], name="filled")
    product = ir.node("Mul", [x, x], name="product")
    made = ir.Graph([x], [product.outputs[0]], nodes=[shape, double, filled, product], initializers=[two], name="g")
    assert shape_nodes(ir.Model(made, ir_version=10)) == {"shape", "double"}


def test_nodes_on_the_cpu_are_reported_by_the_session_itself(tmp_path: Path) -> None:
    made, _ = engine(tmp_path)
    assert made.assigned.nodes == {"CPUExecutionProvider": 3}
    assert sorted(word.rpartition("(")[2] for word in made.assigned.on_cpu) == ["Add)", "Cast)", "Identity)"]
    with pytest.raises(
        ArtifactError, match=r"CUDAExecutionProvider cannot run 3 of 3 nodes, the CPU would: .*\(Cast\)"
    ):
        made.assigned.require_gpu(tmp_path / "model.onnx", "CUDAExecutionProvider")
    Assignment({"CUDAExecutionProvider": 9, "CPUExecutionProvider": 1}, ()).require_gpu(tmp_path, "CUDA")


def test_a_provider_that_is_not_in_this_onnx_runtime_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="ONNX Runtime .* has no CUDAExecutionProvider: pip install onnxruntime-gpu in"
    ):
        BoundEngine(graph(tmp_path), PORTS, PROVIDERS["cuda"], plan(tmp_path), CpuDevice(), "cpu")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ArtifactError, match="model.onnx: CPUExecutionProvider cannot load it"):
        BoundEngine(tmp_path / "model.onnx", PORTS, PROVIDERS["cpu"], plan(tmp_path), CpuDevice(), "cpu")


OPEN = """
import sys
from pathlib import Path
from runtimes.ort.bound import open_session
from kit.providers import PROVIDERS
from runtimes.ort.providers import Plan
from tests.runtimes.test_ort_providers import PORTS, SIZES
open_session(Path({graph!r}), PORTS, PROVIDERS[{name!r}], Plan(SIZES, Path({cache!r})), 77)
"""


@ort_gpu.needs_ort_gpu
@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_the_real_wheel_without_a_gpu_is_rejected_instead_of_running_on_the_cpu(name: str, tmp_path: Path) -> None:
    code = OPEN.format(graph=str(graph(tmp_path)), name=name, cache=str(tmp_path))
    done = ort_gpu.run(code, ort_gpu.FOLDER)
    title = PROVIDERS[name].title
    assert f"UsageError: ONNX Runtime could not load {title} and fell back to CPUExecutionProvider" in done.stderr, done


@rtx.needs_rtx
def test_the_real_plugin_without_a_driver_is_rejected_with_its_reason(tmp_path: Path) -> None:
    code = OPEN.format(graph=str(graph(tmp_path)), name="tensorrt-rtx", cache=str(tmp_path))
    done = ort_gpu.run(code, rtx.FOLDER)
    assert "UsageError: NvTensorRTRTXExecutionProvider" in done.stderr, done.stderr[-2000:]


def test_a_plugin_that_is_not_installed_is_named() -> None:
    import onnxruntime as ort

    with pytest.raises(UsageError, match="is not installed .*: pip install onnxruntime-ep-nv-tensorrt-rtx-cu13"):
        register(replace(PROVIDERS["tensorrt-rtx"], plugin="onnxruntime_ep_that_is_not_there"), ort)
