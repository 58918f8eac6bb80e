"""Run a part from packages that AOTInductor compiled: a server needs no diffusers, no tracing and no compiler.

A package contains machine code for one device, one set of shapes and one release of torch, but no weights; all packages
of a part share the weights. An artifact is rejected unless torch, device and processor are those it was compiled for,
because the behavior of other machine code is undefined.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kit.artifact import verify
from kit.dtypes import to_array, to_tensor
from kit.engine import Array
from kit.errors import ArtifactError, EngineError
from kit.ports import PartName, Ports
from runtimes.aoti import buckets
from runtimes.aoti.package import Package
from runtimes.cuda_graph import Replay

Launch = Literal["calls", "graphs"]  # launch every kernel, or replay a recorded CUDA graph
WEIGHTS = "weights.safetensors"


def this_torch() -> str:
    return str(torch.__version__)


def this_processor(device: str) -> str:
    """Return what compiled code depends on: the GPU's compute capability, or the CPU's vector instructions."""
    if device.startswith("cuda"):
        major, minor = torch.cuda.get_device_capability()
        return f"compute capability {major}.{minor}"
    return f"CPU with {torch.backends.cpu.get_cpu_capability()}"


def check_machine(options: Mapping[str, Any], where: Path) -> str:
    """Return the device that packages were compiled for; `options` are those of their artifact.

    Raises ArtifactError if this machine has another torch, device or instruction set.
    """
    device = str(options["device"])
    if options["torch"] != this_torch():
        raise ArtifactError(
            f"{where} was compiled with torch {options['torch']}; this environment has {this_torch()}: compile it again"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ArtifactError(f"{where} was compiled for {options['gpu']}; torch finds no CUDA GPU here")
    if options["processor"] != this_processor(device):
        raise ArtifactError(
            f"{where} was compiled for {options['processor']}; this machine has {this_processor(device)}: "
            "compile it again"
        )
    return device


class AotiEngine:
    """The packages of one part as an engine."""

    def __init__(self, index: Path, ports: Ports, options: Mapping[str, Any], launch: Launch | None = None) -> None:
        """Load the packages listed in `index`; raises ArtifactError if they are for another machine.

        By default kernels are launched one by one on a CPU, and by CUDA graphs on a GPU.
        """
        self.ports = ports
        home = index.parent
        self.device = check_machine(options, home)
        if launch == "graphs" and not self.device.startswith("cuda"):
            raise ArtifactError(f"{home} was compiled for a CPU, which has no CUDA graphs; use launch 'calls'")
        packages = json.loads(index.read_text())["packages"]
        self.buckets: list[buckets.Sizes] = [package["sizes"] for package in packages]
        self._weights = _read_weights(home / WEIGHTS, self.device)
        self._packages = [Package(home / package["file"], self._weights) for package in packages]
        self._replays: dict[int, Replay] = {}  # by bucket
        self._launch = launch or ("graphs" if self.device.startswith("cuda") else "calls")

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        tensors = {port.name: to_tensor(inputs[port.name]) for port in self.ports.inputs if port.name in inputs}
        try:
            sizes = buckets.sizes_of(self.ports, {name: tuple(x.shape) for name, x in tensors.items()})
            made = [
                self._call(call, {name: x[call.start : call.stop] for name, x in tensors.items()})
                for call in buckets.calls(self.buckets, sizes)
            ]
        except (ValueError, LookupError, RuntimeError) as error:  # torch reports out of memory as a RuntimeError
            raise EngineError(str(error)) from error
        return {self.ports.outputs[0].name: to_array(torch.cat(made))}

    def _call(self, call: buckets.Call, rows: Mapping[str, Tensor]) -> Tensor:
        """Run one package on rows padded to its batch; returns the rows without padding, on the CPU."""
        batch = self.buckets[call.bucket][buckets.BATCH]
        padded = {name: pad(x, batch).to(self.device) for name, x in rows.items()}
        if self._launch == "calls":
            output = self._packages[call.bucket](**padded)
        else:
            if call.bucket not in self._replays:
                self._replays[call.bucket] = Replay(self._packages[call.bucket], padded)
            output = self._replays[call.bucket](padded)
        result: Tensor = output[: call.stop - call.start].cpu()
        return result


def open_engine(folder: Path, part: PartName, launch: Launch | None = None) -> AotiEngine:
    """Open a part of an artifact; raises ArtifactError or UsageError unless it verifies and is for this machine."""
    manifest = verify(folder, kinds=("aoti",))
    record = manifest.part(part)
    return AotiEngine(folder / record.graph, record.ports, manifest.options, launch)


def _read_weights(path: Path, device: str) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    weights: dict[str, Tensor] = load_file(path, device=device)
    return weights


def pad(x: Tensor, batch: int) -> Tensor:
    """Repeat the last row until there are `batch` rows."""
    return x if len(x) == batch else torch.cat([x, x[-1:].expand(batch - len(x), *x.shape[1:])])
