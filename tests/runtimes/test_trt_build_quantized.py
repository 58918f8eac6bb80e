"""Quantized artifacts through the builder: codes of INT8 and INT4 arrive by address, as they lie in the artifact."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.__main__ import main
from export.artifact import ExportConfig, export
from kit.artifact import verify
from kit.cuda_device import CudaDevice, Machine
from kit.recipes import find_recipe
from quantize.apply.apply import apply
from runtimes.trt.build import apart
from runtimes.trt.build import artifact as engine_artifact
from runtimes.trt.external_weights import ExternalWeights
from runtimes.trt.record import EngineRecord
from tests.conftest import ByFamily
from tests.runtimes.bindings import load
from tests.runtimes.bindings.builder_world import BuilderWorld, run_here
from tests.runtimes.bindings.real import VERSIONS, interface
from tests.runtimes.bindings.strict import StrictModule

L4 = CudaDevice("NVIDIA L4", (8, 9), 23034 * 2**20, "580.65.06")


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest) -> Iterator[StrictModule]:
    made = StrictModule(interface(request.param))
    with load.using(made):
        yield made


@pytest.fixture(scope="module")
def quantized(checkpoint_of: ByFamily, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Export the tiny klein's transformer in bf16 once and quantize it by a recipe of weights."""
    folder = tmp_path_factory.mktemp("quantized")
    export(checkpoint_of("klein"), folder / "bf16", ExportConfig(("transformer",), "bf16"))

    def make(recipe: str) -> Path:
        if not (folder / recipe).exists():
            apply(folder / "bf16", folder / recipe, find_recipe(recipe))
        return folder / recipe

    return make


INT8, INT4 = onnx.TensorProto.INT8, onnx.TensorProto.INT4


@pytest.mark.parametrize(("recipe", "kind"), [("int8-weights", INT8), ("int4-weights", INT4)])
def test_codes_reach_the_parser_as_they_lie_in_the_artifact(
    trt: StrictModule, quantized: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, kind: int
) -> None:
    world = BuilderWorld(trt)
    monkeypatch.setattr(engine_artifact, "this_machine", lambda: Machine(L4, trt.__version__))
    monkeypatch.setattr(apart, "run", run_here)  # a child process would not have the stand-in
    source, out = quantized(recipe), tmp_path / "engine"
    cache = ["--timing-cache", str(tmp_path / "timings")]
    assert main(["engine", str(source), "--gpu", "l4", "--out", str(out), *cache]) == 0
    assert EngineRecord.of(verify(out)).plans_of("transformer")
    weights = ExternalWeights(source / "transformer" / "model.onnx")
    codes = [t for t in weights.proto.graph.initializer if t.data_type == kind]
    assert codes
    bits = 8 if kind == INT8 else 4
    for tensor in codes:
        assert len(world.weights[tensor.name]) == (math.prod(tensor.dims) * bits + 7) // 8
    for name, address, length in weights:
        assert world.weights[name] == ctypes.string_at(address, length)
