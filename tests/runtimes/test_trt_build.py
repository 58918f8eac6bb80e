"""The builder against NVIDIA's real signatures: what it asks TensorRT for, and that one misspelled name is noticed."""

from __future__ import annotations

import copy
import errno
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest

from kit.cuda_device import CudaDevice
from kit.errors import ArtifactError, CheckFailed
from kit.ports import Port, Ports
from runtimes.trt.build.options import EngineOptions, PlannedPlan
from runtimes.trt.profiles import AxisRange, Profile
from runtimes.trt.weight_inputs import WeightList
from tests.runtimes.bindings import load
from tests.runtimes.bindings.builder_world import PORTS, STORED, BuilderWorld, write_graph
from tests.runtimes.bindings.real import VERSIONS, interface
from tests.runtimes.bindings.strict import StrictModule

PROFILES = (
    Profile("small", {"batch": AxisRange(1, 1, 4), "image_tokens": AxisRange(16, 256, 256)}),
    Profile("large", {"batch": AxisRange(1, 1, 2), "image_tokens": AxisRange(257, 4096, 4096)}),
)
PLAN = PlannedPlan("transformer", "transformer/model.plan", PROFILES)
DEVICE = CudaDevice("NVIDIA L4", (8, 9), 23034 * 2**20, "580.65.06")
OPTIONS = EngineOptions("l4")


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest) -> Iterator[StrictModule]:
    made = StrictModule(interface(request.param))
    with load.using(made):
        yield made


def build(
    tmp_path: Path, options: EngineOptions = OPTIONS, ports: Ports = PORTS, ticks: list[float] | None = None
) -> Any:
    """Build the tiny graph against the stand-in that is loaded now."""
    tmp_path.mkdir(exist_ok=True)
    graph = tmp_path / "model.onnx"
    if not graph.exists():
        write_graph(tmp_path)
    cache = load.module("runtimes.trt.build.timing").TimingCache(tmp_path / "timings", DEVICE)
    tick = (lambda fraction, phase: ticks.append(fraction)) if ticks is not None else (lambda fraction, phase: None)
    out = tmp_path / "model.plan"
    return load.module("runtimes.trt.build.build").build_plan(PLAN, graph, ports, options, out, cache, tick)


def test_a_plan_reaches_the_disk_with_its_profiles_and_precisions(trt: StrictModule, tmp_path: Path) -> None:
    world = BuilderWorld(trt)
    record = build(tmp_path)
    assert (tmp_path / "model.plan").read_bytes() == world.plan
    assert record.bytes == len(world.plan)
    assert record.profiles == PROFILES
    assert record.layers["quantized"] == {"asked": 2, "run": 1, "share": 0.5}
    assert record.layers["missed"] == ["fallen_back"]


def test_every_weight_arrives_by_address_with_the_bytes_of_the_linked_file(trt: StrictModule, tmp_path: Path) -> None:
    world = BuilderWorld(trt)
    build(tmp_path)
    stored = (tmp_path / "elsewhere.bin").read_bytes()
    offset = 8
    for name, (*_, size) in STORED.items():
        assert world.weights[name] == stored[offset : offset + size], name
        offset += size
    assert set(world.weights) == set(STORED), "the scale is stored in the graph"
    assert not trt.called("OnnxParser", "parse_from_file")


def test_networks_are_strongly_typed_in_the_form_that_both_major_versions_take(
    trt: StrictModule, tmp_path: Path
) -> None:
    BuilderWorld(trt)
    build(tmp_path)
    flag = int(trt.types["NetworkDefinitionCreationFlag"].STRONGLY_TYPED)  # type: ignore[attr-defined]
    assert trt.called("Builder", "create_network") == [{"flags": 1 << flag}]


def test_profiles_give_every_input_its_three_shapes(trt: StrictModule, tmp_path: Path) -> None:
    BuilderWorld(trt)
    build(tmp_path)
    shapes = trt.called("IOptimizationProfile", "set_shape")
    assert shapes == [
        {"input": "x", "min": (1, 16, 16), "opt": (1, 256, 16), "max": (4, 256, 16)},
        {"input": "ids", "min": (1, 16, 4), "opt": (1, 256, 4), "max": (4, 256, 4)},
        {"input": "x", "min": (1, 257, 16), "opt": (1, 4096, 16), "max": (2, 4096, 16)},
        {"input": "ids", "min": (1, 257, 4), "opt": (1, 4096, 4), "max": (2, 4096, 4)},
    ]
    assert len(trt.called("IBuilderConfig", "add_optimization_profile")) == 2


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, set()),
        ({"weights": "refit"}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
        ({"weights": "stream"}, {"WEIGHT_STREAMING"}),
        ({"version": "compatible"}, {"VERSION_COMPATIBLE"}),
    ],
)
def test_options_become_flags_and_never_a_precision(
    trt: StrictModule, tmp_path: Path, options: dict[str, Any], flags: set[str]
) -> None:
    BuilderWorld(trt)
    build(tmp_path, replace(OPTIONS, **options))
    known: Any = trt.types["BuilderFlag"]
    assert {call["flag"] for call in trt.called("IBuilderConfig", "set_flag")} == {known[flag] for flag in flags}
    assert [call["flag"].name for call in trt.called("IBuilderConfig", "clear_flag")] == ["TF32"]


def test_workspace_and_hardware_are_passed_on(trt: StrictModule, tmp_path: Path) -> None:
    world = BuilderWorld(trt)
    seen: list[Any] = []
    world.on_step = lambda step: seen.append(step)
    configs: list[Any] = []
    trt.behave("Builder", "create_builder_config", lambda b: configs.append(trt.create("IBuilderConfig")) or configs[0])  # type: ignore[func-returns-value]
    build(tmp_path, replace(OPTIONS, workspace=2**30, hardware="ampere-plus", level=5))
    (pool,) = trt.called("IBuilderConfig", "set_memory_pool_limit")
    assert (pool["pool"].name, pool["pool_size"]) == ("WORKSPACE", 2**30)
    assert configs[0].hardware_compatibility_level.name == "AMPERE_PLUS"
    assert configs[0].builder_optimization_level == 5
    assert configs[0].profiling_verbosity.name == "DETAILED"


def test_progress_never_runs_backwards_and_ends_at_one(trt: StrictModule, tmp_path: Path) -> None:
    BuilderWorld(trt)
    ticks: list[float] = []
    build(tmp_path, ticks=ticks)
    assert ticks == sorted(ticks)
    assert ticks[:4] == [0.0, 0.0, 0.125, 0.25]
    assert ticks[-1] == 1.0


def test_an_interrupt_stops_the_build_at_its_next_step_and_keeps_the_timings(
    trt: StrictModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread waits in `join`; what Ctrl-C does there is raised by hand once the build has begun."""
    import threading

    world = BuilderWorld(trt)
    begun, interrupted = threading.Event(), threading.Event()

    def on_step(step: int) -> None:
        begun.set()
        assert interrupted.wait(10)

    world.on_step = on_step
    progress_module = load.module("runtimes.trt.build.progress")
    real_join = threading.Thread.join

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        if timeout is not None and begun.wait(10) and not interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()
        real_join(thread, timeout)

    monkeypatch.setattr(progress_module.threading.Thread, "join", join)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    assert world.stopped_after == 0
    assert [file.read_bytes() for file in (tmp_path / "timings").iterdir()] == [b"timings"]


def test_timings_are_kept_per_gpu_driver_and_version_and_given_to_the_next_build(
    trt: StrictModule, tmp_path: Path
) -> None:
    BuilderWorld(trt)
    build(tmp_path)
    (file,) = (tmp_path / "timings").iterdir()
    assert file.name == f"nvidia-l4-driver-580.65.06-tensorrt-{trt.__version__}.cache"
    build(tmp_path)
    given = [call["serialized_timing_cache"] for call in trt.called("IBuilderConfig", "create_timing_cache")]
    assert given == [b"", b"timings"]


def _start_without_timings(trt: StrictModule, tmp_path: Path) -> None:
    BuilderWorld(trt)
    answers = iter((False, True))
    trt.behave("IBuilderConfig", "set_timing_cache", lambda config, cache, ignore_mismatch: next(answers))
    build(tmp_path)


def test_timings_that_tensorrt_rejects_are_replaced_with_a_warning(
    trt: StrictModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _start_without_timings(trt, tmp_path)
    assert "TensorRT rejects these timings; starting without them" in caplog.text


def test_timings_that_cannot_be_written_do_not_fail_the_build(
    trt: StrictModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    BuilderWorld(trt)
    tmp_path.joinpath("timings").write_text("a file where the folder should be")
    build(tmp_path)
    assert "the timings were not saved" in caplog.text


def test_a_full_disk_ends_the_build_with_the_disks_own_error(
    trt: StrictModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    BuilderWorld(trt)
    module = load.module("runtimes.trt.build.build")

    class Full:
        def write(self, data: bytes) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = module.PlanWriter(Full())
    assert writer.write(b"plan") == 0
    monkeypatch.setattr(module, "PlanWriter", lambda stream: writer)
    with pytest.raises(OSError, match="No space left on device"):
        build(tmp_path)


def test_what_the_parser_rejects_is_reported_with_its_node(trt: StrictModule, tmp_path: Path) -> None:
    world = BuilderWorld(trt)
    world.parses = False
    with pytest.raises(ArtifactError, match="cannot parse the graph: some_node: no such operator"):
        build(tmp_path)


def test_a_graph_or_weight_that_the_parser_does_not_load_is_reported(trt: StrictModule, tmp_path: Path) -> None:
    BuilderWorld(trt)
    trt.behave("OnnxParser", "load_initializer", lambda parser, name, data, size: False)
    with pytest.raises(ArtifactError, match="rejects the weight 'codes': it gives no reason"):
        build(tmp_path)
    trt.behave("OnnxParser", "load_model_proto", lambda parser, model, path=None: False)
    with pytest.raises(ArtifactError, match="TensorRT cannot load the graph"):
        build(tmp_path)


def test_a_failed_build_is_reported_with_tensorrts_own_reason(
    trt: StrictModule, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    world = BuilderWorld(trt)
    world.builds = False
    with pytest.raises(CheckFailed, match="could not build the transformer: TensorRT gives no reason"):
        build(tmp_path)
    _log_every_severity(trt)


def _log_every_severity(trt: StrictModule, *_: Any) -> None:
    log = load.module("runtimes.trt.log").Log()
    severities: Any = trt.types["ILogger.Severity"]
    for severity in severities:
        log.log(severity, severity.name)
    assert str(log) == "INTERNAL_ERROR; ERROR"


def test_a_plan_that_does_not_load_and_a_rejected_profile_are_reported(trt: StrictModule, tmp_path: Path) -> None:
    BuilderWorld(trt)
    trt.behave("Runtime", "deserialize_cuda_engine", lambda runtime, serialized_engine: None)
    with pytest.raises(CheckFailed, match="TensorRT cannot load the plan that it built"):
        build(tmp_path)
    trt.behave("IBuilderConfig", "add_optimization_profile", lambda config, profile: -1)
    with pytest.raises(CheckFailed, match=r"TensorRT rejects profile small \(batch 1..4, image_tokens 16..256\)"):
        build(tmp_path)


def test_a_network_that_differs_from_its_ports_is_refused(trt: StrictModule, tmp_path: Path) -> None:
    BuilderWorld(trt)
    x, ids = PORTS.inputs
    with pytest.raises(ArtifactError, match="input x is BF16 in the network, fp32 in its port"):
        build(tmp_path, ports=replace(PORTS, inputs=(replace(x, dtype="fp32"), ids)))
    with pytest.raises(ArtifactError, match=r"input x has shape \[-1, -1, 16\] in the network"):
        build(tmp_path, ports=replace(PORTS, inputs=(replace(x, dims=("batch", "image_tokens", 8)), ids)))
    with pytest.raises(ArtifactError, match="the network has inputs ids, x; its ports are ids, other, x"):
        build(tmp_path, ports=replace(PORTS, inputs=(x, ids, Port("other", "fp32", ("batch",)))))


def _older(version: str) -> StrictModule:
    """Return a stand-in without the features that TensorRT 10.13 added."""
    about = copy.deepcopy(interface(version))
    for method in ("load_model_proto", "load_initializer", "parse_model_proto"):
        del about["classes"]["OnnxParser"]["methods"][method]
        del about["classes"]["OnnxParserRefitter"]["methods"][method.replace("parse", "refit")]
    del about["classes"]["Builder"]["methods"]["build_serialized_network_to_stream"]
    return StrictModule(about)


def test_a_version_without_streams_and_addresses_builds_all_the_same(tmp_path: Path) -> None:
    older = _older(VERSIONS[0])
    with load.using(older):
        _build_older(older, tmp_path)


def _build_older(trt: StrictModule, tmp_path: Path) -> None:
    world = OldWorld(trt)
    build(tmp_path)
    assert trt.called("OnnxParser", "parse_from_file") == [{"model": str(tmp_path / "model.onnx")}]
    assert (tmp_path / "model.plan").read_bytes() == world.plan
    world.builds = False
    with pytest.raises(CheckFailed, match="could not build the transformer"):
        build(tmp_path)


class OldWorld(BuilderWorld):
    """A world whose parser reads files itself."""

    def __init__(self, trt: StrictModule) -> None:
        behave = trt.behave

        def known(cls: str, attribute: str, behaviour: Any) -> None:
            if attribute in trt.interface["classes"][cls]["methods"] or not attribute.endswith(
                ("_proto", "_initializer")
            ):
                behave(cls, attribute, behaviour)

        trt.behave = known  # type: ignore[method-assign]
        super().__init__(trt)


def test_weights_as_inputs_are_inputs_of_the_network_and_listed(trt: StrictModule, tmp_path: Path) -> None:
    world = BuilderWorld(trt)
    build(tmp_path, replace(OPTIONS, weights="inputs"))
    assert world.weights == {}
    names = {value.name for value in world.model.graph.input}
    assert names == {port.name for port in PORTS.inputs} | {"codes", "small", "plain"}
    listed = WeightList.read(tmp_path / "model.weights.json")
    stored = (tmp_path / "weights.safetensors").read_bytes()
    assert {w.name: stored[w.offset : w.offset + w.nbytes] for w in listed.weights} == _stored(tmp_path)
    assert not trt.called("IBuilderConfig", "set_flag")


def _stored(folder: Path) -> dict[str, bytes]:
    """Read the weights of the graph by their places."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    content, found = (folder / "weights.safetensors").read_bytes(), {}
    for tensor in graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if place:
            found[tensor.name] = content[int(place["offset"]) :][: int(place["length"])]
    return found


# --- one misspelled name ---------------------------------------------------------------------------------------------

SCENARIOS: tuple[Callable[[StrictModule, Path], None], ...] = (
    test_a_plan_reaches_the_disk_with_its_profiles_and_precisions,
    test_every_weight_arrives_by_address_with_the_bytes_of_the_linked_file,
    test_networks_are_strongly_typed_in_the_form_that_both_major_versions_take,
    test_profiles_give_every_input_its_three_shapes,
    *(
        partial(test_options_become_flags_and_never_a_precision, options=options, flags=flags)
        for options, flags in (
            ({"weights": "refit"}, {"STRIP_PLAN", "REFIT_IDENTICAL"}),
            ({"weights": "stream"}, {"WEIGHT_STREAMING"}),
            ({"version": "compatible"}, {"VERSION_COMPATIBLE"}),
        )
    ),
    test_workspace_and_hardware_are_passed_on,
    test_weights_as_inputs_are_inputs_of_the_network_and_listed,
    _start_without_timings,
    _log_every_severity,
    test_progress_never_runs_backwards_and_ends_at_one,
    test_what_the_parser_rejects_is_reported_with_its_node,
)


def walk(version: str, folder: Path, sources: Mapping[str, str] | None = None) -> None:
    """Go through the builder once; what is not as it should be raises."""
    for number, scenario in enumerate(SCENARIOS):
        trt = StrictModule(interface(version))
        with load.using(trt, sources):
            if not number:
                for name in load.BUILDER:
                    load.resolve_annotations(name)
            place = folder / str(number)
            place.mkdir(parents=True)
            scenario(trt, place)
    older = _older(version)
    with load.using(older, sources):
        _build_older(older, folder)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", load.BUILDER)
def test_every_single_misspelled_name_is_noticed(version: str, name: str, tmp_path: Path) -> None:
    load.check_misspellings(name, version, walk, tmp_path)
