"""The TensorRT runtime against NVIDIA's real signatures: contexts, graphs, the arena, split batches, rejections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kit.cuda_device import Machine
from kit.errors import ArtifactError, EngineError
from tests.runtimes.bindings import load
from tests.runtimes.bindings.builder_world import BuilderWorld, write_graph
from tests.runtimes.bindings.real import VERSIONS, interface
from tests.runtimes.bindings.runtime_world import (
    DEVICE,
    NEEDS,
    PORTS,
    CpuDevice,
    RuntimeWorld,
    expected,
    inputs,
    machine,
    record,
)
from tests.runtimes.bindings.strict import StrictModule


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest) -> Iterator[StrictModule]:
    made = StrictModule(interface(request.param))
    with load.using(made):
        yield made


def open_engine(trt: StrictModule, root: Path, graphs: bool = True, **changed: Any) -> tuple[Any, CpuDevice]:
    device = CpuDevice()
    made = record(trt.__version__, root, **changed)
    RuntimeWorld(trt, made, device)
    ports: Any = {"transformer": PORTS}
    here = machine(trt.__version__)
    engines = load.module("runtimes.trt.engine").open_engines(root, made, ports, device, here, graphs)
    return engines["transformer"], device


def same(found: Mapping[str, Any], wanted: Any) -> bool:
    assert set(found) == {"y"}
    assert found["y"].dtype == ml_dtypes.bfloat16
    return bool(np.array_equal(found["y"].view(np.int16), wanted.view(np.int16)))


def test_a_shape_runs_once_and_is_then_replayed_from_its_graph(trt: StrictModule, tmp_path: Path) -> None:
    engine, device = open_engine(trt, tmp_path)
    for seed in range(3):
        given = inputs(2, 5, seed)
        assert same(engine.run(given), expected(given))
    assert (device.captures, device.replays) == (1, 2)
    assert len(trt.called("IExecutionContext", "execute_async_v3")) == 2, (
        "once without a graph, once during the capture"
    )


def test_without_graphs_every_call_is_enqueued_with_the_same_result(trt: StrictModule, tmp_path: Path) -> None:
    plain, device = open_engine(trt, tmp_path, graphs=False)
    for rows, tokens in ((2, 5), (1, 20), (2, 5), (3, 8)):
        given = inputs(rows, tokens)
        assert same(plain.run(given), expected(given))
    assert device.captures == 0


def test_shapes_may_alternate_and_each_keeps_its_graph(trt: StrictModule, tmp_path: Path) -> None:
    engine, device = open_engine(trt, tmp_path)
    for seed, (rows, tokens) in enumerate(((1, 4), (2, 4), (1, 30), (1, 4), (2, 4), (1, 30))):
        given = inputs(rows, tokens, seed)
        assert same(engine.run(given), expected(given))
    assert (device.captures, device.replays) == (3, 3)


def test_shapes_used_least_recently_are_freed(
    trt: StrictModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, device = open_engine(trt, tmp_path)
    monkeypatch.setattr(load.module("runtimes.trt.engine"), "KEPT_SHAPES", 2)
    for tokens in (1, 2, 3, 1):
        given = inputs(1, tokens)
        assert same(engine.run(given), expected(given))
    assert device.captures == 4, "the graph of one token was dropped and made again"
    assert len(engine._prepared) == 2


def test_a_batch_larger_than_its_profile_is_split_and_concatenated(trt: StrictModule, tmp_path: Path) -> None:
    engine, device = open_engine(trt, tmp_path)
    given = inputs(5, 20)
    assert same(engine.run(given), expected(given))
    assert [shape for shape in device.uploads if shape[2] == 2] == [(2, 20, 2), (2, 20, 2), (1, 20, 2)]


def test_all_contexts_share_one_arena_of_the_largest_size(trt: StrictModule, tmp_path: Path) -> None:
    open_engine(trt, tmp_path)
    given = trt.called("IExecutionContext", "set_device_memory")
    assert len(given) == 2
    assert given[0] == given[1]
    assert given[0]["size"] == max(NEEDS.values())
    assert given[0]["memory"] % 256 == 0


def test_an_arena_does_not_move_once_it_is_allocated(trt: StrictModule, tmp_path: Path) -> None:
    arena = load.module("runtimes.trt.plans").Arena(CpuDevice())
    arena.reserve(10)
    assert arena.address == arena.address
    with pytest.raises(AssertionError, match="allocated already"):
        arena.reserve(20)


def test_a_read_only_array_is_uploaded_once(trt: StrictModule, tmp_path: Path) -> None:
    engine, device = open_engine(trt, tmp_path)
    given = inputs(1, 4)
    given["ids"].flags.writeable = False
    for seed in (1, 2):
        given["x"] = inputs(1, 4, seed)["x"]
        assert same(engine.run(given), expected(given))
    assert [shape[2] for shape in device.uploads] == [2, 4, 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": np.zeros((1, 4, 2), np.float32)}, "input x is float32, its port is bf16"),
        ({"ids": np.zeros((2, 4, 4), np.int64)}, r"input ids has shape \[2, 4, 4\], its port is"),
        ({"ids": np.zeros((1, 4), np.int64)}, r"input ids has shape \[1, 4\]"),
        ({"ids": None}, "input ids is missing; given: x"),
    ],
)
def test_inputs_that_do_not_fit_their_ports_are_rejected(
    trt: StrictModule, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    engine, _ = open_engine(trt, tmp_path)
    given = {name: value for name, value in {**inputs(1, 4), **change}.items() if value is not None}
    with pytest.raises(EngineError, match=words):
        engine.run(given)


def test_a_size_outside_all_profiles_is_rejected_with_the_profiles(trt: StrictModule, tmp_path: Path) -> None:
    engine, _ = open_engine(trt, tmp_path)
    with pytest.raises(EngineError, match=r"no profile of the engine accepts image_tokens 33; it has: small \(batch"):
        engine.run(inputs(1, 33))


@pytest.mark.parametrize(
    ("method", "answer", "words"),
    [
        ("set_input_shape", False, r"TensorRT rejects shape \[1, 4, 2\] of x: TensorRT gives no reason"),
        ("infer_shapes", ["ids"], "TensorRT needs the shapes or values of ids"),
        ("get_tensor_shape", (1, -1, 2), r"the shape of output y cannot be inferred from the inputs: \[1, -1, 2\]"),
        ("set_tensor_address", False, "TensorRT rejects the address of x"),
        ("execute_async_v3", False, "TensorRT failed to run"),
    ],
)
def test_what_tensorrt_rejects_at_run_time_is_an_engine_error(
    trt: StrictModule, tmp_path: Path, method: str, answer: Any, words: str
) -> None:
    engine, _ = open_engine(trt, tmp_path)
    trt.behave("IExecutionContext", method, lambda context, **_: answer)
    with pytest.raises(EngineError, match=words):
        engine.run(inputs(1, 4))


def test_a_gpu_out_of_memory_is_an_engine_error_and_the_next_call_works(trt: StrictModule, tmp_path: Path) -> None:
    engine, device = open_engine(trt, tmp_path)
    real = device.empty

    def full(shape: tuple[int, ...], dtype: Any) -> Any:
        raise RuntimeError("CUDA out of memory")

    device.empty = full  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="the GPU failed: CUDA out of memory"):
        engine.run(inputs(1, 4))
    device.empty = real  # type: ignore[method-assign]
    assert same(engine.run(inputs(1, 4)), expected(inputs(1, 4)))


def test_a_plan_without_weights_gets_them_from_the_graph_by_address(trt: StrictModule, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    write_graph(tmp_path / "transformer")
    world = BuilderWorld(trt)
    engine, _ = open_engine(trt, tmp_path, weights="refit")
    assert same(engine.run(inputs(1, 4)), expected(inputs(1, 4)))
    assert set(world.weights) == {"codes", "small", "plain"}
    assert len(trt.called("OnnxParserRefitter", "refit_model_proto")) == 2
    assert len(trt.called("Refitter", "refit_cuda_engine")) == 2


def test_a_failed_refit_names_the_missing_weights(trt: StrictModule, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    write_graph(tmp_path / "transformer")
    BuilderWorld(trt)
    trt.behave("Refitter", "refit_cuda_engine", lambda refitter: False)
    trt.behave("Refitter", "get_missing_weights", lambda refitter: ["codes"])
    with pytest.raises(ArtifactError, match=r"the plan still lacks weights \(codes\)"):
        open_engine(trt, tmp_path, weights="refit")
    trt.behave("OnnxParserRefitter", "refit_model_proto", lambda reader: False)
    trt.behave("OnnxParserRefitter", "num_errors", lambda reader: 1)
    with pytest.raises(ArtifactError, match="does not fit the plan: some_node: no such operator"):
        open_engine(trt, tmp_path, weights="refit")


def test_streamed_weights_share_the_budget_that_tensorrt_computes(trt: StrictModule, tmp_path: Path) -> None:
    engine, _ = open_engine(trt, tmp_path, weights="stream")
    budgets = [loaded.engine.weight_streaming_budget_v2 for loaded in engine._plans._loaded]
    assert budgets == [4000, 8000], "a third and two thirds of it"
    trt.behave("ICudaEngine", "get_weight_streaming_automatic_budget", lambda engine: 10**6)
    engine._plans.share_budget(engine._plans.streamable)
    budgets = [loaded.engine.weight_streaming_budget_v2 for loaded in engine._plans._loaded]
    assert budgets == [10_000, 20_000], "never more than there is to stream"


def test_a_version_compatible_plan_may_run_its_own_runtime(trt: StrictModule, tmp_path: Path) -> None:
    engine, _ = open_engine(trt, tmp_path, version="compatible")
    assert engine._plans._runtime.engine_host_code_allowed is True
    engine, _ = open_engine(trt, tmp_path / "exact")
    assert engine._plans._runtime.engine_host_code_allowed is False


def test_a_plan_that_is_missing_or_broken_or_has_other_profiles_is_rejected(trt: StrictModule, tmp_path: Path) -> None:
    engine, _ = open_engine(trt, tmp_path)
    trt.behave("ICudaEngine", "num_optimization_profiles", lambda engine: 3)
    trt.behave("ICudaEngine", "get_device_memory_size_for_profile_v2", lambda engine, profile_index: 1)
    with pytest.raises(ArtifactError, match="small.plan: has 3 profiles, the manifest has 1"):
        engine._plans.contexts()
    made = record(trt.__version__, tmp_path)
    plans = load.module("runtimes.trt.plans").Plans
    device = CpuDevice()
    arena = load.module("runtimes.trt.plans").Arena(device)
    trt.behave("Runtime", "deserialize_cuda_engine", lambda runtime, serialized_engine: None)
    with pytest.raises(ArtifactError, match="TensorRT cannot load the plan: TensorRT gives no reason"):
        plans(tmp_path, "transformer", made, device, arena)
    (tmp_path / "transformer" / "small.plan").unlink()
    with pytest.raises(ArtifactError, match="small.plan: missing or empty; build the engine again"):
        plans(tmp_path, "transformer", made, device, arena)
    with pytest.raises(ArtifactError, match="the engine has no vae_decoder; it has: transformer"):
        plans(tmp_path, "vae_decoder", made, device, arena)


def test_a_context_that_cannot_be_created_or_set_is_rejected(trt: StrictModule, tmp_path: Path) -> None:
    engine, _ = open_engine(trt, tmp_path)
    trt.behave("IExecutionContext", "set_optimization_profile_async", lambda context, **_: False)
    with pytest.raises(ArtifactError, match=r"small.plan: profile small \(.*\) cannot be set"):
        engine._plans.contexts()
    trt.behave("ICudaEngine", "create_execution_context", lambda engine, **_: None)
    with pytest.raises(ArtifactError, match="small.plan: cannot create an execution context"):
        engine._plans.contexts()


def test_an_engine_of_another_gpu_does_not_load(trt: StrictModule, tmp_path: Path) -> None:
    made = record(trt.__version__, tmp_path)
    other = Machine(replace(DEVICE, title="NVIDIA L40S"), trt.__version__)
    with pytest.raises(
        ArtifactError, match=r"built on NVIDIA L4 \(compute capability 8.9\), this machine has NVIDIA L4"
    ):
        load.module("runtimes.trt.engine").open_engines(tmp_path, made, {}, CpuDevice(), other)


# --- one misspelled name ---------------------------------------------------------------------------------------------


def test_weights_that_are_inputs_are_bound_once_and_exchanged_in_place(trt: StrictModule, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    graph = write_graph(tmp_path / "transformer")
    listed = load.module("runtimes.trt.external_weights").ExternalWeights(graph).as_inputs()
    for name in ("small", "large"):
        listed.write(tmp_path / "transformer" / f"{name}.weights.json")
    engine, device = open_engine(trt, tmp_path, weights="inputs")
    bound = [call for call in trt.called("IExecutionContext", "set_tensor_address") if call["name"] != "x"]
    assert [call["name"] for call in bound] == 2 * [weight.name for weight in listed.weights]
    assert len({call["memory"] for call in bound}) == len(listed.weights), "one copy for both plans"
    assert same(engine.run(inputs(1, 4)), expected(inputs(1, 4)))
    uploads = len(device.uploads)
    engine.load_weights(graph)
    assert len(device.uploads) == uploads + len(listed.weights)
    assert same(engine.run(inputs(1, 4)), expected(inputs(1, 4)))
    trt.behave("IExecutionContext", "set_tensor_address", lambda context, name, memory: False)
    with pytest.raises(ArtifactError, match="TensorRT rejects the weight codes"):
        engine._plans.contexts()
    with pytest.raises(ArtifactError, match="build the engine with --weights inputs to exchange them"):
        open_engine(trt, tmp_path)[0].load_weights(graph)


SCENARIOS: tuple[Callable[[StrictModule, Path], None], ...] = (
    test_a_shape_runs_once_and_is_then_replayed_from_its_graph,
    test_all_contexts_share_one_arena_of_the_largest_size,
    test_a_read_only_array_is_uploaded_once,
    test_a_plan_without_weights_gets_them_from_the_graph_by_address,
    test_streamed_weights_share_the_budget_that_tensorrt_computes,
    test_weights_that_are_inputs_are_bound_once_and_exchanged_in_place,
    test_a_version_compatible_plan_may_run_its_own_runtime,
    test_a_failed_refit_names_the_missing_weights,
    test_a_plan_that_is_missing_or_broken_or_has_other_profiles_is_rejected,
    test_a_context_that_cannot_be_created_or_set_is_rejected,
    test_an_engine_of_another_gpu_does_not_load,
    partial(
        test_what_tensorrt_rejects_at_run_time_is_an_engine_error,
        method="infer_shapes",
        answer=["ids"],
        words="TensorRT needs the shapes or values of ids",
    ),
)


def walk(version: str, folder: Path, sources: Mapping[str, str] | None = None) -> None:
    """Go through the runtime once; what is not as it should be raises."""
    for number, scenario in enumerate(SCENARIOS):
        trt = StrictModule(interface(version))
        with load.using(trt, sources):
            if not number:
                for name in load.RUNTIME:
                    load.resolve_annotations(name)
            place = folder / str(number)
            place.mkdir(parents=True)
            scenario(trt, place)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", [name for name in load.RUNTIME if name != "runtimes.trt.rtx"])
def test_every_single_misspelled_name_is_noticed(version: str, name: str, tmp_path: Path) -> None:
    load.check_misspellings(name, version, walk, tmp_path)
