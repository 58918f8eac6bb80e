"""Define the modes of a module: eager, compiled, CUDA graphs, quantized by the kit or by torchao, packaged.

Blocks are compiled instead of the whole network: all blocks of a kind share one compiled function, so 25 blocks compile
as two. A few small operations remain between them, whose launches a CUDA graph hides. Mode `whole` compiles everything
at once, to measure the cost and the gain.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.gpu.cases import Launch, RunSettings
from benchmarks.gpu.clock import Unavailable
from export.aoti.linears import is_quantized
from export.aoti.package import compile_package
from export.graphs.text_encoder import DecoderLayer, TextEncoderGraph
from export.graphs.transformer import TransformerGraph
from runtimes.aoti.package import Package
from runtimes.cuda_graph import Replay

Compiled = Literal["no", "blocks", "whole", "package"]
Call = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Mode:
    """One way of running a module."""

    recipe: str = "bf16"
    library: Literal["own", "torchao"] = "own"
    compiled: Compiled = "blocks"
    launch: Launch | None = None  # None: as in the settings


MODES: Mapping[str, Mode] = {
    "eager": Mode(compiled="no", launch="calls"),
    "compile": Mode(launch="calls"),
    "graphs": Mode(launch="graphs"),
    "whole": Mode(compiled="whole"),
    "fp8": Mode("fp8"),
    "int8": Mode("int8"),
    "int8-weights": Mode("int8-weights"),
    "fp8-torchao": Mode("fp8", "torchao"),
    "int8-torchao": Mode("int8", "torchao"),
    "int8-weights-torchao": Mode("int8-weights", "torchao"),
    "int4-weights-torchao": Mode("int4-weights", "torchao"),
    "aoti": Mode(compiled="package"),
    "aoti-fp8": Mode("fp8", compiled="package"),
}


def mode_of(name: str, settings: RunSettings) -> Mode:
    """Look up a mode; its launch comes from the settings if the mode does not set it."""
    mode = MODES[name]
    mode = replace(mode, launch=mode.launch or settings.launch)
    if mode.launch == "graphs" and not settings.device.startswith("cuda"):
        raise Unavailable("CUDA graphs need a CUDA GPU")
    return mode


def quantize_by_torchao(module: nn.Module, recipe: str) -> None:
    """Quantize the linear layers of blocks with torchao's configurations."""
    try:
        from torchao import quantization as ao  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise Unavailable(
            "torchao is not installed; it can be installed from a wheel, see the command's help"
        ) from None
    config = {
        "fp8": lambda: ao.Float8DynamicActivationFloat8WeightConfig(granularity=ao.PerRow()),
        "int8": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        "int8-weights": lambda: ao.Int8WeightOnlyConfig(),
        "int4-weights": lambda: ao.Int4WeightOnlyConfig(group_size=128),
    }[recipe]()
    try:
        ao.quantize_(module, config, filter_fn=lambda child, name: isinstance(child, nn.Linear) and is_quantized(name))
    except (ImportError, AssertionError) as error:  # how torchao rejects a device or requires another package
        raise Unavailable(f"torchao: {error}") from None


def ready(module: Any, mode: Mode, settings: RunSettings) -> Call:
    """Compile a module for a mode and return a call that runs it; each new shape is compiled on its first call."""
    torch._dynamo.config.recompile_limit = 64  # one compiled function per shape is intended
    match mode.compiled:
        case "blocks":
            compile_blocks(module, settings.backend)
        case "whole":
            module.compile(backend=settings.backend, dynamic=False)
        case "package":
            return Packaged(module, mode.launch == "graphs")
        case "no":
            pass
    return Graphs(module) if mode.launch == "graphs" else Calls(module)


def compile_blocks(module: Any, backend: str) -> None:
    """Compile the repeated blocks of a part once per kind; a part without such blocks is compiled whole."""
    if isinstance(module, TransformerGraph):
        double, single = (
            torch.compile(f, backend=backend, dynamic=False) for f in (module.double_block, module.single_block)
        )
        module.use(double, single)
    elif isinstance(module, TextEncoderGraph):
        layer_forward: Any = torch.compile(DecoderLayer.forward, backend=backend, dynamic=False)
        for layer in module.model.layers:
            layer.forward = partial(layer_forward, layer)
    else:
        module.compile(backend=backend, dynamic=False)


@dataclass
class Calls:
    """Launches every kernel on each call."""

    module: Callable[..., Tensor]

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return self.module(**inputs)


class Graphs:
    """Records one CUDA graph per set of shapes on its first call."""

    def __init__(self, module: Callable[..., Tensor]) -> None:
        self.module = module
        self.recorded: dict[tuple[tuple[int, ...], ...], Replay] = {}

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        shapes = tuple(tuple(x.shape) for x in inputs.values())
        if shapes not in self.recorded:
            self.recorded[shapes] = Replay(self.module, inputs)
        return self.recorded[shapes](inputs)


class Packaged:
    """Compiles an AOTInductor package per set of shapes and runs it, like a deployment of such packages."""

    def __init__(self, module: nn.Module, graphs: bool) -> None:
        self.module, self.graphs = module, graphs
        self.calls: dict[tuple[tuple[int, ...], ...], Call] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="flux2-packages-")

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        shapes = tuple(tuple(x.shape) for x in inputs.values())
        if shapes not in self.calls:
            path = Path(self.folder.name) / f"{len(self.calls)}.pt2"
            compile_package(self.module, inputs, path)
            weights = {**dict(self.module.named_parameters()), **dict(self.module.named_buffers())}
            package = Package(path, {name: weight.detach() for name, weight in weights.items()})
            self.calls[shapes] = Graphs(package) if self.graphs else Calls(package)
        return self.calls[shapes](inputs)
