"""Run a part of a checkpoint in torch, using the same module that is exported.

Its layers have the names of the exported graph, and every source that can be exported (folders, shards, single files,
merged adapters) can be run. Weights are memory-mapped: a model larger than memory is paged in from its files layer by
layer. On a GPU, `offload` moves each layer to the device only while it runs.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from export.derived import Derived
from export.graphs.constants import read_constant
from export.lora.merge import MERGEABLE, merge
from export.lora.terms import Lora
from export.parts import MODULE
from export.trace import FakePart
from export.weights import Binding, find
from kit.dtypes import Compute, torch_type
from kit.engine import Array
from kit.errors import UsageError
from kit.ports import PartName, Ports, ports
from kit.safetensors_file import StoredTensor
from kit.variants import Variant

Offload = Literal["none", "layers"]


class TorchPart:
    """Run one part in torch, with the same interface as the server's engines and fp32 inputs and outputs."""

    def __init__(self, module: nn.Module, part: PartName, variant: Variant, dtype: torch.dtype, device: str) -> None:
        self.module, self.dtype, self.device = module, dtype, device
        self.ports: Ports = ports(part, variant, "fp32")

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        given = {port.name: self.tensor(port.name, inputs[port.name]) for port in self.ports.inputs}
        output = self.module(**given)
        return {self.ports.outputs[0].name: output.float().cpu().numpy()}

    def tensor(self, name: str, array: Array) -> Tensor:
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"])).to(self.device)
        wide = name in ("timestep", "guidance") or not tensor.is_floating_point()
        return tensor if wide else tensor.to(self.dtype)

    def linears(self) -> dict[str, nn.Module]:
        """Return the linear layers by their names in the exported graph."""
        return {
            name.removeprefix(MODULE): module
            for name, module in self.module.named_modules()
            if isinstance(module, nn.Linear)
        }


def bind(
    part: PartName,
    variant: Variant,
    checkpoint: Path,
    single_file: Path | None = None,
    loras: tuple[Lora, ...] = (),
    weights: str | None = None,
) -> Binding:
    """Find the weights of a part and merge adapters; raises the same errors as an export."""
    shapes = FakePart(part, variant, "fp32", "matmul").shapes()
    binding = find(part, variant, checkpoint, shapes, single_file, weights)
    return merge(binding, loras, variant, part) if loras and part in MERGEABLE else binding


def load(
    part: PartName,
    variant: Variant,
    binding: Binding,
    compute: Compute | None = None,
    device: str = "cpu",
    offload: Offload = "none",
) -> TorchPart:
    """Build a part and load its weights; `compute` None selects the type in which most of them are stored."""
    compute = compute or stored_type(binding)
    dtype = torch_type(compute)
    module = FakePart(part, variant, compute, "matmul").module
    for name, _ in list(module.named_buffers(recurse=False)):
        values = torch.from_numpy(read_constant(module, name).copy())
        module.register_buffer(name, values, persistent=False)
    for name, tensor in tensors(binding):
        _assign(module, MODULE + name, tensor.to(dtype))
    module.requires_grad_(False)
    if offload == "layers":
        from accelerate import cpu_offload  # type: ignore[import-untyped]

        cpu_offload(module, torch.device(device), offload_buffers=True)
    else:
        module.to(device)
    return TorchPart(module, part, variant, dtype, device)


def stored_type(binding: Binding) -> Compute:
    """Return bf16 if most bytes are stored in BF16 or FP8, otherwise fp32."""
    stored: list[StoredTensor | Derived] = [*binding.tensors.values(), *binding.derived.values()]
    half = sum(tensor.nbytes for tensor in stored if tensor.dtype in ("BF16", "F8_E4M3"))
    return "bf16" if 2 * half > sum(tensor.nbytes for tensor in stored) else "fp32"


def tensors(binding: Binding) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight by its name in the graph module, mapped from its file or computed if it is derived."""
    maps: dict[Path, mmap.mmap] = {}
    for name, stored in binding.tensors.items():
        if stored.file not in maps:
            with stored.file.open("rb") as stream:  # a private mapping, because torch expects writable memory
                maps[stored.file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        tensor = _mapped(maps[stored.file], stored)
        if name in binding.scales:
            tensor = tensor.float() * binding.scales[name].value
        yield name, tensor
    for name, derived in binding.derived.items():
        raw = bytearray(b"".join(derived.chunks()))
        yield name, torch.frombuffer(raw, dtype=torch_type(derived.dtype)).view(derived.shape)


def _mapped(area: mmap.mmap, stored: StoredTensor) -> Tensor:
    dtype = torch_type(stored.dtype)
    count = stored.nbytes // dtype.itemsize
    return torch.frombuffer(area, dtype=dtype, count=count, offset=stored.offset).view(stored.shape)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner.register_buffer(leaf, tensor)


def check_device(device: str, offload: Offload) -> None:
    """Raise UsageError for a device that does not exist, and for offloading on a CPU."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch finds no CUDA GPU here; use --device cpu")
    if offload != "none" and device == "cpu":
        raise UsageError("--offload layers requires a GPU; on a CPU weights are paged in from their files anyway")
