"""Build one plan: options to TensorRT's config, the plan streamed to disk, its layers looked at."""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import tensorrt as trt

from kit.errors import CheckFailed
from kit.ports import Ports
from runtimes.trt.build.network import check_ports, parse
from runtimes.trt.build.options import EngineOptions, PlannedPlan
from runtimes.trt.build.precisions import summarize
from runtimes.trt.build.progress import Progress, Tick, interruptible
from runtimes.trt.build.timing import TimingCache
from runtimes.trt.external_weights import ExternalWeights
from runtimes.trt.log import Log
from runtimes.trt.record import Hardware, PlanRecord, Version, WeightMode

FLAGS: Mapping[WeightMode | Version, tuple[trt.BuilderFlag, ...]] = {
    "plan": (),
    "refit": (trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.REFIT_IDENTICAL),  # no fusion is lost, as REFIT would
    "stream": (trt.BuilderFlag.WEIGHT_STREAMING,),
    "exact": (),
    "compatible": (trt.BuilderFlag.VERSION_COMPATIBLE,),
}
HARDWARE: Mapping[Hardware, trt.HardwareCompatibilityLevel] = {
    "exact": trt.HardwareCompatibilityLevel.NONE,
    "same-capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
    "ampere-plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
}
CHUNK = 64 * 2**20


class PlanWriter(trt.IStreamWriter):
    """Writes a plan to disk as TensorRT hands it out; a full disk ends the build with the disk's own error."""

    def __init__(self, stream: BinaryIO) -> None:
        trt.IStreamWriter.__init__(self)
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:  # must not pass through C++
            self.failure = error
            return 0


def build_plan(
    plan: PlannedPlan, graph: Path, ports: Ports, options: EngineOptions, out: Path, cache: TimingCache, tick: Tick
) -> PlanRecord:
    """Build one plan to `out`; Ctrl-C stops it within a step and leaves its timings in the cache.

    Raises ArtifactError for a graph that TensorRT does not take, CheckFailed with TensorRT's reason when it builds
    nothing, OSError for a disk that is full.
    """
    log, progress = Log(), Progress(tick)
    builder = trt.Builder(log)
    weights = ExternalWeights(graph)
    network, _parser = parse(builder, log, weights)  # the parser owns what it made of small constants
    check_ports(network, ports)
    config = configure(builder, options, progress)
    for profile in plan.profiles:
        shapes = builder.create_optimization_profile()
        for port in ports.inputs:
            shapes.set_shape(port.name, *profile.shapes(port))
        if config.add_optimization_profile(shapes) < 0:
            raise CheckFailed(f"TensorRT refuses profile {profile} of the {plan.part}: {log}")
    cache.attach(config)
    try:
        with out.open("wb") as stream:
            if not interruptible(lambda: _write(builder, network, config, stream), progress):
                raise CheckFailed(f"TensorRT built nothing of the {plan.part}: {log}")
    finally:
        cache.keep(config)
    layers = summarize(inspect(out, log, options.version), weights.proto)
    return PlanRecord(plan.file, plan.profiles, out.stat().st_size, layers)


def configure(builder: trt.Builder, options: EngineOptions, progress: Progress) -> trt.IBuilderConfig:
    """Turn options into a builder config; precision is the network's own, there is no flag for it."""
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # else the inspector knows names of layers only
    config.hardware_compatibility_level = HARDWARE[options.hardware]
    config.progress_monitor = progress
    config.clear_flag(trt.BuilderFlag.TF32)  # what a graph does in fp32 is there for its precision
    for flag in (*FLAGS[options.weights], *FLAGS[options.version]):
        config.set_flag(flag)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    return config


def _write(builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, stream: BinaryIO) -> bool:
    """Build and write; where the version cannot stream, the plan passes through memory once."""
    if hasattr(builder, "build_serialized_network_to_stream"):
        writer = PlanWriter(stream)
        written = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.failure is not None:
            raise writer.failure
        return written
    memory = builder.build_serialized_network(network, config)
    if memory is None:
        return False
    view = memoryview(memory)
    for start in range(0, len(view), CHUNK):
        stream.write(view[start : start + CHUNK])
    return True


def inspect(plan: Path, log: Log, version: Version) -> dict[str, Any]:
    """Return what TensorRT's engine inspector says of a plan; its weights are not needed for that."""
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = version == "compatible"  # such a plan brings its own runtime along
    with plan.open("rb") as stream:
        engine = runtime.deserialize_cuda_engine(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    if engine is None:
        raise CheckFailed(f"{plan}: TensorRT cannot load the plan that it built: {log}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    found: dict[str, Any] = json.loads(text)
    return found
