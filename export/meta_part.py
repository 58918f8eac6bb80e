"""A part as a torch module whose weights take no memory yet: they can be drawn on a GPU or read straight onto it.

Only the computed constants (frequencies) are real. Unlike the fake tensors of a trace, meta tensors can be replaced one
by one, so that a model larger than memory can be filled and quantized layer by layer.
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
    """Build the module of a part with weights of the compute type on the meta device, constants on the CPU."""
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
        if "num_batches_tracked" in owner._buffers:  # counts training batches; no checkpoint need have it
            owner.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))
    return module.requires_grad_(False)


def assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, by its dotted name."""
    path, _, leaf = name.rpartition(".")
    owner: Any = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner.register_buffer(leaf, tensor, persistent=leaf not in owner._non_persistent_buffers_set)
