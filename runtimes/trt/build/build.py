"""Build one plan: configure TensorRT, stream the plan to disk, inspect its layers."""

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
    "refit": (trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.REFIT_IDENTICAL),  # unlike REFIT, it keeps every fusion
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
    """Writes a plan to disk while TensorRT produces it; a full disk ends the build with its OSError."""

    def __init__(self, stream: BinaryIO) -> None:
        trt.IStreamWriter.__init__(self)
        self._stream = stream
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:  # an exception must not cross C++
            self.failure = error
            return 0


def build_plan(
    plan: PlannedPlan, graph: Path, ports: Ports, options: EngineOptions, out: Path, cache: TimingCache, tick: Tick
) -> PlanRecord:
    """Build one plan to `out`; Ctrl-C stops the build at its next step and keeps its timings in the cache.

    Raises ArtifactError if TensorRT rejects the graph, CheckFailed with TensorRT's reason if the build fails, and
    OSError if the disk is full.
    """
    log, progress = Log(), Progress(tick)
    builder = trt.Builder(log)
    weights = ExternalWeights(graph)
    network, _parser = parse(builder, log, weights)  # the parser owns the memory of small constants
    check_ports(network, ports)
    config = configure(builder, options, progress)
    for profile in plan.profiles:
        shapes = builder.create_optimization_profile()
        for port in ports.inputs:
            shapes.set_shape(port.name, *profile.shapes(port))
        if config.add_optimization_profile(shapes) < 0:
            raise CheckFailed(f"TensorRT rejects profile {profile} of the {plan.part}: {log}")
    cache.attach(config)
    try:
        with out.open("wb") as stream:
            if not interruptible(lambda: _write(builder, network, config, stream), progress):
                raise CheckFailed(f"TensorRT could not build the {plan.part}: {log}")
    finally:
        cache.keep(config)
    layers = summarize(inspect(out, log, options.version), weights.proto)
    return PlanRecord(plan.file, plan.profiles, out.stat().st_size, layers)


def configure(builder: trt.Builder, options: EngineOptions, progress: Progress) -> trt.IBuilderConfig:
    """Create a builder config from options; the network is strongly typed, so precision has no flag."""
    config = builder.create_builder_config()
    config.builder_optimization_level = options.level
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # otherwise the inspector reports only names of layers
    config.hardware_compatibility_level = HARDWARE[options.hardware]
    config.progress_monitor = progress
    config.clear_flag(trt.BuilderFlag.TF32)  # a graph uses fp32 only where it needs the precision
    for flag in (*FLAGS[options.weights], *FLAGS[options.version]):
        config.set_flag(flag)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    return config


def _write(builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, stream: BinaryIO) -> bool:
    """Build and write; a version that cannot stream holds the plan in memory once."""
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
    """Return the report of TensorRT's engine inspector on a plan; this does not need its weights."""
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = version == "compatible"  # such a plan contains its own runtime
    with plan.open("rb") as stream:
        engine = runtime.deserialize_cuda_engine(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    if engine is None:
        raise CheckFailed(f"{plan}: TensorRT cannot load the plan that it built: {log}")
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    found: dict[str, Any] = json.loads(text)
    return found
