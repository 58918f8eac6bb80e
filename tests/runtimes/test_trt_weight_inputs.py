"""Plans without weights: the same function with weights as inputs, one plan for two checkpoints, weights exchanged."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from benchmarks.sparse_quantized import synthetic_record
from export.artifact import ExportConfig, export
from kit import tiny
from kit.errors import ArtifactError
from kit.recipes import RECIPES
from quantize.apply.apply import apply
from runtimes.trt import bound_weights
from runtimes.trt.bound_weights import BoundWeights
from runtimes.trt.external_weights import ExternalWeights
from runtimes.trt.weight_inputs import SUFFIX, WeightList
from tests.runtimes.bindings.runtime_world import CpuDevice
from tests.runtimes.rtx import needs_rtx, run

QuantizedOf = Callable[[str], Path]
NUMPY = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.INT8: np.int8}


def feeds(weights: ExternalWeights, listed: WeightList) -> dict[str, Any]:
    """Read every weight as the input that it has become."""
    found = {}
    for weight in listed.weights:
        raw = weights.read(weight.file, weight.offset, weight.nbytes)
        values = np.frombuffer(raw, NUMPY[weight.type]).reshape(weight.shape)
        found[weight.name] = np.ascontiguousarray(values.T) if weight.transposed else values
    return found


def embedded(weights: ExternalWeights) -> bytes:
    """Return the graph with what is still stored outside of it inside: ONNX Runtime reads no linked files."""
    model = onnx.ModelProto.FromString(weights.proto.SerializeToString())
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            raw = weights.read(entries["location"], int(entries["offset"]), int(entries["length"]))
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = raw
    content: bytes = model.SerializeToString()
    return content


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export a checkpoint that is stored in fp32 as fp32."""
    root = tmp_path_factory.mktemp("plain")
    tiny.save(root / "checkpoint", tiny.Tiny(text_tokens=64))
    export(root / "checkpoint", root / "fp32", ExportConfig(("transformer",)))
    return root / "fp32"


@pytest.mark.parametrize("recipe", ["fp32", "int8"])
def test_a_graph_with_weights_as_inputs_computes_the_same(recipe: str, plain: Path) -> None:
    if recipe != "fp32" and not plain.with_name(recipe).is_dir():
        apply(plain, plain.with_name(recipe), RECIPES[recipe], synthetic_record(plain))
    folder = plain.with_name(recipe) / "transformer"
    whole, cut = ExternalWeights(folder / "model.onnx"), ExternalWeights(folder / "model.onnx")
    listed = cut.as_inputs()
    large = [w for w in listed.weights if w.nbytes > 10_000]
    assert len(large) > 12
    assert sum(w.nbytes for w in listed.weights) > 0.95 * sum(size for _, _, size in whole)
    assert not {name for name, _, _ in cut} & {w.name for w in listed.weights}
    rng = np.random.default_rng(0)
    given: dict[str, Any] = {}
    for port in whole.proto.graph.input:
        dims = [d.dim_value for d in port.type.tensor_type.shape.dim]
        shape = [dims[0] or 1, *(size or 16 for size in dims[1:])]
        integer = port.type.tensor_type.elem_type == onnx.TensorProto.INT64
        given[port.name] = rng.integers(0, 16, shape) if integer else rng.standard_normal(shape).astype(np.float32)
    given["timestep"] = np.array([0.5], np.float32)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with_weights = ort.InferenceSession(embedded(whole), options).run(None, given)
    as_inputs = ort.InferenceSession(embedded(cut), options).run(None, {**given, **feeds(cut, listed)})
    assert np.array_equal(with_weights[0], as_inputs[0])


def test_the_graph_transposes_no_weight(plain: Path) -> None:
    weights = ExternalWeights(plain / "transformer" / "model.onnx")
    listed = weights.as_inputs()
    names = {w.name for w in listed.weights}
    assert [w for w in listed.weights if w.transposed]
    for node in weights.proto.graph.node:
        assert node.op_type != "Transpose" or node.input[0] not in names
    shapes = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in weights.proto.graph.input}
    for w in listed.weights:
        assert shapes[w.name] == list(reversed(w.shape) if w.transposed else w.shape)


def test_scales_stay_in_the_plan(quantized_of: QuantizedOf) -> None:
    for recipe in ("fp8", "int4-weights"):
        listed = ExternalWeights(quantized_of(recipe) / "transformer" / "model.onnx").as_inputs()
        assert not [w.name for w in listed.weights if w.name.endswith(".scale")]
        assert [w.name for w in listed.weights if w.name.endswith((".fp8", ".int4"))]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one size with other weights, quantized with the same record but their own scales."""
    root = tmp_path_factory.mktemp("two")
    for seed in (0, 1):
        tiny.save(root / f"checkpoint-{seed}", tiny.Tiny(seed=seed, text_tokens=64))
        export(root / f"checkpoint-{seed}", root / f"bf16-{seed}", ExportConfig(("transformer",), dtype="bf16"))
    return root / "bf16-0", root / "bf16-1"


def listed_beside(plan: Path, artifact: Path) -> Path:
    """Put the list and the files of an artifact's transformer beside a plan."""
    plan.parent.mkdir(parents=True, exist_ok=True)
    ExternalWeights(artifact / "transformer" / "model.onnx").as_inputs().write(plan.with_suffix(SUFFIX))
    for file in (artifact / "transformer").glob("*.safetensors"):
        shutil.copyfile(file, plan.parent / file.name)
    return plan


def memory_of(bound: BoundWeights) -> dict[str, bytes]:
    return {name: memory.numpy().tobytes() for name, memory in bound._memory.items()}


def test_weights_are_exchanged_in_place(two: tuple[Path, Path], tmp_path: Path) -> None:
    plan = listed_beside(tmp_path / "engine" / "model.plan", two[0])
    bound = BoundWeights(CpuDevice(), plan)
    before, addresses = memory_of(bound), dict(bound.addresses())
    for artifact in (two[1], two[0]):
        bound.load(artifact / "transformer" / "model.onnx")
        source = ExternalWeights(artifact / "transformer" / "model.onnx")
        for w in source.as_inputs().weights:
            raw = np.frombuffer(source.read(w.file, w.offset, w.nbytes), np.uint8)
            if w.transposed:
                raw = np.ascontiguousarray(raw.view(np.int16).reshape(w.shape).T).reshape(-1).view(np.uint8)
            assert memory_of(bound)[w.name] == raw.tobytes(), w.name
    assert memory_of(bound) == before
    assert dict(bound.addresses()) == addresses  # so captured graphs stay valid
    assert bound.nbytes == sum(w.nbytes for w in bound.listed.weights)


def test_what_does_not_fit_is_refused_before_anything_changes(two: tuple[Path, Path], tmp_path: Path) -> None:
    bound = BoundWeights(CpuDevice(), listed_beside(tmp_path / "engine" / "model.plan", two[0]))
    before = memory_of(bound)
    tiny.save(tmp_path / "wide", tiny.Tiny(heads=4, text_tokens=64))
    export(tmp_path / "wide", tmp_path / "wide-bf16", ExportConfig(("transformer",), dtype="bf16"))
    with pytest.raises(ArtifactError, match="cannot be loaded into this plan: .* has another shape or type"):
        bound.load(tmp_path / "wide-bf16" / "transformer" / "model.onnx")
    quantized = [tmp_path / f"fp8-{i}" for i in range(len(two))]
    for source, out in zip(two, quantized, strict=True):
        apply(source, out, RECIPES["fp8"], synthetic_record(source))
    with pytest.raises(ArtifactError, match="cannot be loaded into this plan: it has no weight"):
        bound.load(quantized[0] / "transformer" / "model.onnx")
    eight = BoundWeights(CpuDevice(), listed_beside(tmp_path / "eight" / "model.plan", quantized[0]))
    with pytest.raises(ArtifactError, match="quantization scales differ from those in the plan; build an engine"):
        eight.load(quantized[1] / "transformer" / "model.onnx")
    assert memory_of(bound) == before


def test_a_bad_list_or_a_short_file_is_named(two: tuple[Path, Path], tmp_path: Path) -> None:
    plan = listed_beside(tmp_path / "model.plan", two[0])
    (weights,) = tmp_path.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=rf"{weights.name}: ends at byte {len(content) // 2}, the weight"):
        BoundWeights(CpuDevice(), plan)
    weights.unlink()
    with pytest.raises(ArtifactError, match="missing or empty; it contains weights of the engine"):
        BoundWeights(CpuDevice(), plan)
    for content_of_list in ("{", "[]", '{"weights": [{}], "constants": ""}', '{"weights": 3}'):
        plan.with_suffix(SUFFIX).write_text(content_of_list)
        with pytest.raises(ArtifactError, match=r"model\.weights\.json: not a list of weights"):
            BoundWeights(CpuDevice(), plan)


def test_weights_that_cannot_be_read_midway_leave_the_previous_ones(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = BoundWeights(CpuDevice(), listed_beside(tmp_path / "engine" / "model.plan", two[0]))
    before, listed, count = memory_of(bound), bound.listed, 0
    read = bound_weights._read

    def failing(file: Any, weight: Any, folder: Path) -> Any:
        nonlocal count
        count += 1
        if count == 10:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(folder / weight.file))
        return read(file, weight, folder)

    monkeypatch.setattr(bound_weights, "_read", failing)
    with pytest.raises(ArtifactError, match="cannot be read .Input/output error.; the previous weights are loaded"):
        bound.load(two[1] / "transformer" / "model.onnx")
    assert memory_of(bound) == before
    assert bound.listed == listed


@needs_rtx
def test_a_full_disk_ends_a_build_without_weights_in_a_sentence(two: tuple[Path, Path], tmp_path: Path) -> None:
    words = ["--gpu", "l4", "--sides", "128", "--max-batch", "1", "--weights", "inputs"]
    full = run("export", "engine", str(two[0]), "--out", str(tmp_path / "made" / "engine"), *words, file_bytes=100_000)
    assert full.returncode == 2
    assert "cannot write" in full.stderr
    assert "File too large (transformer/model.plan)" in full.stderr
    assert "Traceback" not in full.stderr
    assert list((tmp_path / "made").iterdir()) == []


@needs_rtx
def test_two_checkpoints_of_one_size_have_the_same_plan(two: tuple[Path, Path], tmp_path: Path) -> None:
    plans = []
    for i, artifact in enumerate(two):
        out = tmp_path / f"engine-{i}"
        words = ["--gpu", "l4", "--out", str(out), "--sides", "128", "--max-batch", "1", "--weights", "inputs"]
        done = run("export", "engine", str(artifact), *words, "--json")
        assert done.returncode == 0, done.stderr
        facts = json.loads(done.stdout.splitlines()[-1])
        assert facts["weights"] == "inputs"
        plans.append((out / "transformer" / "model.plan").read_bytes())
        listed = WeightList.read(out / "transformer" / f"model{SUFFIX}")
        assert all((out / "transformer" / w.file).is_file() for w in listed.weights)
        assert not (out / "transformer" / "model.onnx").exists()
    assert plans[0] == plans[1]
    assert len(plans[0]) < 8e6


@needs_rtx
def test_weights_as_inputs_change_no_kernel_of_fp8(two: tuple[Path, Path], tmp_path: Path) -> None:
    apply(two[0], tmp_path / "fp8", RECIPES["fp8"], synthetic_record(two[0]))
    told = []
    for weights in ("plan", "inputs"):
        words = ["--gpu", "l4", "--out", str(tmp_path / weights), "--sides", "128", "--max-batch", "1"]
        done = run("export", "engine", str(tmp_path / "fp8"), *words, "--weights", weights, "--json")
        assert done.returncode == 0, done.stderr
        told.append(json.loads(done.stdout.splitlines()[-1])["plans"]["transformer"][0]["layers"])
    plan, inputs_ = told
    for same in ("products", "quantized", "attention", "missed"):
        assert plan[same] == inputs_[same]
