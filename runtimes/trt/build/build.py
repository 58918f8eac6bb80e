"""Build one plan: configure TensorRT, stream the plan to disk, inspect its layers."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import tensorrt as trt

from kit.compilers import COMPILERS, Compiler, Hardware, Version, WeightMode
from kit.errors import CheckFailed
from kit.gpus import gpu
from kit.ports import Ports
from runtimes.trt import weight_inputs
from runtimes.trt.build.account import account
from runtimes.trt.build.apart import Tick
from runtimes.trt.build.network import check_ports, parse
from runtimes.trt.build.options import EngineOptions, PlannedPlan
from runtimes.trt.build.progress import Progress, interruptible
from runtimes.trt.build.timing import TimingCache
from runtimes.trt.external_weights import ExternalWeights
from runtimes.trt.layer_table import SUFFIX, from_inspector, from_log, write
from runtimes.trt.log import Log
from runtimes.trt.profiles import Profile, best_sizes, one_size
from runtimes.trt.record import PlanRecord

FLAGS: Mapping[WeightMode | Version, tuple[trt.BuilderFlag, ...]] = {
    "plan": (),
    "refit": (trt.BuilderFlag.STRIP_PLAN, trt.BuilderFlag.REFIT_IDENTICAL),  # unlike REFIT, it keeps every fusion
    "stream": (trt.BuilderFlag.WEIGHT_STREAMING,),
    "inputs": (),
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
    """Writes a plan to disk while TensorRT produces it, or discards it where there is no stream.

    A full disk ends the build with its OSError.
    """

    def __init__(self, stream: BinaryIO | None) -> None:
        trt.IStreamWriter.__init__(self)
        self.stream = stream
        self.failure: OSError | None = None

    def write(self, data: bytes) -> int:
        if self.stream is None:
            return len(data)
        try:
            return self.stream.write(data)
        except OSError as error:  # an exception must not cross C++
            self.failure = error
            return 0


def build_plan(
    plan: PlannedPlan,
    graph: Path,
    ports: Ports,
    options: EngineOptions,
    out: Path,
    cache: TimingCache | None,
    tick: Tick,
    row: Compiler = COMPILERS["tensorrt"],
) -> PlanRecord:
    """Build one plan to `out`; Ctrl-C stops the build at its next step and keeps its timings in the cache.

    The record's account comes from the compiler's own table of layers. Sizes in a table of several profiles are
    dynamic, so where the compiler writes its table to the log, the graph is compiled once more at the best sizes of one
    profile, for bytes, scratch memory and roofline; that plan is discarded.

    Raises ArtifactError if TensorRT rejects the graph, CheckFailed with TensorRT's reason if the build fails, and
    OSError if the disk is full.
    """
    weights = ExternalWeights(graph)
    listed = weights.as_inputs() if options.weights == "inputs" else None
    card = gpu(options.gpu)
    static = one_size(plan.profiles) if row.table == "log" else None
    parts = 1 if static is None else 2

    def first(fraction: float, phase: str) -> None:
        tick(fraction / parts, phase)

    try:
        with out.open("wb") as stream:
            log = _compile(plan, plan.profiles, weights, ports, options, cache, first, row, PlanWriter(stream))
    except OSError as error:
        error.filename = error.filename or str(out)  # a failed write does not say which file
        raise
    if row.table == "inspector":
        layers = from_inspector(inspect(out, log, options.version))
        told = account(layers, weights.proto, card)
    else:
        layers = from_log(log.tables)
        told = account(layers, weights.proto, card, log.scratch)
    if static is not None:

        def second(fraction: float, phase: str) -> None:
            tick((1 + fraction) / parts, phase)

        sized = _compile(plan, (static,), weights, ports, options, cache, second, row, PlanWriter(None))
        layers = from_log(sized.tables)
        table = account(layers, weights.proto, card, sized.scratch)
        told = {**table, "missed": told["missed"] or table["missed"], "scratch_of_all_profiles": log.scratch}
        told["sizes"] = best_sizes(static)
    write(layers, out.with_suffix(SUFFIX))
    if listed is not None:
        listed.write(out.with_suffix(weight_inputs.SUFFIX))
    tick(1.0, "done")
    return PlanRecord(plan.file, plan.profiles, out.stat().st_size, told)


def _compile(
    plan: PlannedPlan,
    profiles: Sequence[Profile],
    weights: ExternalWeights,
    ports: Ports,
    options: EngineOptions,
    cache: TimingCache | None,
    tick: Tick,
    row: Compiler,
    writer: PlanWriter,
) -> Log:
    """Build a plan for profiles and hand it to `writer`; returns the log."""
    log, progress = Log(), Progress(tick)
    builder = trt.Builder(log)
    network, _parser = parse(builder, log, weights)  # the parser owns the memory of small constants
    check_ports(network, ports, weights.inputs)
    config = configure(builder, options, progress, row)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for port in ports.inputs:
            shapes.set_shape(port.name, *profile.shapes(port))
        if config.add_optimization_profile(shapes) < 0:
            raise CheckFailed(f"TensorRT rejects profile {profile} of the {plan.part}: {log}")
    if cache is not None:
        cache.attach(config)
    try:
        if not interruptible(lambda: _write(builder, network, config, writer), progress):
            raise CheckFailed(f"{row.title} could not build the {plan.part}: {log}")
    finally:
        if cache is not None:
            cache.keep(config)
    return log


def configure(
    builder: trt.Builder, options: EngineOptions, progress: Progress, row: Compiler = COMPILERS["tensorrt"]
) -> trt.IBuilderConfig:
    """Create a builder config from options; the network is strongly typed, so precision has no flag."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # otherwise the table has only names of layers
    if row.levels:
        config.builder_optimization_level = options.level
    if len(row.hardware) > 1:
        config.hardware_compatibility_level = HARDWARE[options.hardware]
    if row.targets:
        major, minor = gpu(options.gpu).compute_capability
        ahead: Any = config  # whose targets only the bindings of TensorRT for RTX have
        ahead.num_compute_capabilities = 1  # without a target, the plan would be for an unstated one
        ahead.set_compute_capability(getattr(_bindings().ComputeCapability, f"SM{major}{minor}"), 0)
    config.progress_monitor = progress
    config.clear_flag(trt.BuilderFlag.TF32)  # a graph uses fp32 only where it needs the precision
    for flag in (*FLAGS[options.weights], *FLAGS[options.version]):
        config.set_flag(flag)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    return config


def _bindings() -> Any:
    return trt


def _write(
    builder: trt.Builder, network: trt.INetworkDefinition, config: trt.IBuilderConfig, writer: PlanWriter
) -> bool:
    """Build and write; a version that cannot stream holds the plan in memory once."""
    if hasattr(builder, "build_serialized_network_to_stream"):
        written = builder.build_serialized_network_to_stream(network, config, writer)
        if writer.failure is not None:
            raise writer.failure
        return written
    memory = builder.build_serialized_network(network, config)
    if memory is None:
        return False
    view = memoryview(memory)
    for start in range(0, len(view), CHUNK):
        if writer.stream is not None:
            writer.stream.write(view[start : start + CHUNK])
    return True


def inspect(plan: Path, log: Log, version: Version) -> str:
    """Return the JSON of TensorRT's engine inspector on a plan; this does not need its weights."""
    runtime = trt.Runtime(log)
    runtime.engine_host_code_allowed = version == "compatible"  # such a plan contains its own runtime
    with plan.open("rb") as stream:
        engine = runtime.deserialize_cuda_engine(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    if engine is None:
        raise CheckFailed(f"{plan}: TensorRT cannot load the plan that it built: {log}")
    return str(engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON))
