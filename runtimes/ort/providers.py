"""The options with which a part is opened in an execution provider of ONNX Runtime (kit.providers).

The names of options are held to the real libraries by tests/runtimes/test_ort_providers.py, because ONNX Runtime
reports a wrong one only on a machine with a GPU.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.artifact import digest
from kit.cuda_device import CudaDevice
from kit.errors import UsageError
from kit.ports import Ports
from kit.providers import Provider
from runtimes.trt.profiles import AxisRange, Profile


@dataclass(frozen=True)
class Plan:
    """How one part is opened on a GPU."""

    profile: Profile  # the sizes that are run; TensorRT compiles for these
    cache: Path  # folder of compiled engines
    memory_limit: int | None = None  # bytes of the provider's arena; None: no limit
    graphs: bool = True  # record a CUDA graph per shape
    device: int = 0


def options(row: Provider, ports: Ports, plan: Plan, stream: int | None) -> dict[str, str]:
    """Return the options of a provider for a part; all its work runs on `stream`, a handle of CUDA, if one is given."""
    shared = _stream(stream)
    match row.name:
        case "cpu":
            return {}
        case "cuda":
            return _cuda(plan, shared)
        case "tensorrt":
            return {
                "device_id": str(plan.device),
                **shared,
                "trt_engine_cache_enable": "1",
                "trt_engine_cache_path": str(plan.cache),
                "trt_timing_cache_enable": "1",
                "trt_timing_cache_path": str(plan.cache),
                "trt_context_memory_sharing_enable": "1",
                "trt_cuda_graph_enable": _flag(plan.graphs),
                "trt_bf16_enable": _flag(_uses_bf16(ports)),
                **_profile("trt_profile", ports, plan.profile, ","),
            }
        case "tensorrt-rtx":
            return {
                "has_user_compute_stream": _flag(stream is not None),
                **shared,
                "nv_runtime_cache_path": str(plan.cache),
                "enable_cuda_graph": _flag(plan.graphs),
                **_profile("nv_profile", ports, plan.profile, ";"),
            }


def next_options(row: Provider, plan: Plan, stream: int | None) -> list[tuple[str, dict[str, str]]]:
    """Return the providers that run what a provider leaves over, with their options; none is the CPU."""
    without = Plan(plan.profile, plan.cache, plan.memory_limit, graphs=False, device=plan.device)
    return [(title, _cuda(without, _stream(stream))) for title in row.next]


def _cuda(plan: Plan, shared: Mapping[str, str]) -> dict[str, str]:
    limit = {} if plan.memory_limit is None else {"gpu_mem_limit": str(plan.memory_limit)}
    return {
        "device_id": str(plan.device),
        **shared,
        "arena_extend_strategy": "kSameAsRequested",  # the other strategy doubles, which wastes gigabytes here
        "cudnn_conv_algo_search": "HEURISTIC",  # an exhaustive search would run again for every image size
        "use_tf32": "0",
        "enable_cuda_graph": _flag(plan.graphs),
        **limit,
    }


def _stream(stream: int | None) -> dict[str, str]:
    return {} if stream is None else {"user_compute_stream": str(stream)}


def _flag(value: bool) -> str:
    return "1" if value else "0"


def _uses_bf16(ports: Ports) -> bool:
    return any(port.dtype == "bf16" for port in (*ports.inputs, *ports.outputs))


def _profile(prefix: str, ports: Ports, profile: Profile, between: str) -> dict[str, str]:
    """Write the smallest, best and largest shape of every input: x:1x16x128,ids:1x16x4."""
    shapes = [(port.name, profile.shapes(port)) for port in ports.inputs]
    return {
        f"{prefix}_{word}_shapes": between.join(f"{name}:{'x'.join(map(str, kinds[i]))}" for name, kinds in shapes)
        for i, word in enumerate(("min", "opt", "max"))
    }


def merged(profiles: Sequence[Profile]) -> Profile:
    """Return one profile that covers the images of all, tuned for one megapixel or else for the largest.

    The batch is that which all accept: memory is needed for the largest batch of the largest image.
    """
    best = next((p for p in profiles if p.name == "1024"), profiles[-1])
    axes = {}
    for axis, tuned in best.axes.items():
        ranges = [p.axes[axis] for p in profiles]
        high = (min if axis == "batch" else max)(r.high for r in ranges)
        axes[axis] = AxisRange(min(r.low for r in ranges), min(tuned.best, high), high)
    return Profile("all", axes)


def cache_folder(graph: Path, device: CudaDevice, version: str) -> Path:
    """Return where engines compiled from a graph are kept: for its weights, a GPU, its driver and ONNX Runtime.

    Engines of TensorRT contain weights, so weight files count by size and modification time as well as by header.
    """
    weights = [
        (file.name, digest(file), file.stat().st_size, file.stat().st_mtime_ns)
        for file in sorted(graph.parent.glob("*.safetensors"))
    ]
    key = [digest(graph), weights, device.title, device.capability, device.driver, version]
    return graph.parent / f"compiled-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"


def register(row: Provider, ort: Any) -> list[Any]:
    """Register a provider that is a plugin, and return the devices that it finds.

    Raises UsageError, which says what to install or why its library does not load.
    """
    try:
        module = importlib.import_module(row.plugin)
    except ImportError as error:
        raise UsageError(f"{row.title} is not installed ({error}): {row.install}") from None
    if row.title not in {device.ep_name for device in ort.get_ep_devices()}:
        try:
            ort.register_execution_provider_library(row.title, module.get_library_path())
        except Exception as error:  # onnxruntime's error types have no common base but Exception
            raise UsageError(f"{row.title} cannot be loaded: {error}") from error
    return [device for device in ort.get_ep_devices() if device.ep_name == row.title]
