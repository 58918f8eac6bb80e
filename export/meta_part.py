"""Build a part as a torch module on the meta device, to be filled with random or stored weights.

Only the computed constants (frequencies) have values. Unlike the fake tensors of a trace, meta tensors can be replaced
one by one, so a model larger than memory can be filled and quantized layer by layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from export.graphs.attention import Attention
from export.graphs.constants import read_constant
from export.parts import PARTS
from kit.dtypes import Compute, torch_type
from kit.ports import PartName
from kit.variants import Variant


def meta_part(part: PartName, variant: Variant, compute: Compute, attention: Attention = "sdpa") -> nn.Module:
    """Build the module of a part with weights of the compute type on the meta device and constants on the CPU."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch_type(compute))
    try:
        with torch.device("meta"):
            module = PARTS[part].build(variant, attention).eval()
    finally:
        torch.set_default_dtype(before)
    for name, _ in list(module.named_buffers(recurse=False)):
        module.register_buffer(name, torch.from_numpy(read_constant(module, name).copy()), persistent=False)
    for owner in module.modules():
        if "num_batches_tracked" in owner._buffers:  # counts training batches; checkpoints may omit it
            owner.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
    return module.requires_grad_(False)


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer, given by its dotted name, with a tensor."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner.register_buffer(leaf, tensor, persistent=leaf not in owner._non_persistent_buffers_set)
