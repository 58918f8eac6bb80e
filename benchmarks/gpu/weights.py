"""Draw random weights at full size on the device; timings do not depend on their values.

Every tensor is drawn in bf16 from a seed derived from its name, so that a part in fp32, in bf16 and quantized starts
from the same values and their errors can be measured. A model is quantized layer by layer while it is drawn: the 32
billion parameters of dev in fp8 never take 64 GB.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn

from export.aoti.linears import LINEARS, is_quantized, quantize_linears
from export.graphs.fusion import fuse_projections
from export.meta_part import meta_part
from export.parts import MODULE
from kit.dtypes import Compute, torch_type
from kit.ports import PartName
from kit.variants import Variant

_MASK = 0x7FFFFFFF


def random_part(
    part: PartName, variant: Variant, compute: Compute, device: str, recipe: str = "bf16", fused: bool = False
) -> Any:
    """Build a part with random weights on a device; `fused` joins the projections of queries, keys and values."""
    module: Any = meta_part(part, variant, compute)
    fill(module, device, torch_type(compute), None if fused else recipe)
    if fused:
        fuse_projections(module.model.transformer_blocks)
        if recipe in LINEARS:
            quantize_linears(module, recipe)
    return module


def fill(module: nn.Module, device: str, dtype: torch.dtype, recipe: str | None = None) -> None:
    """Draw every tensor of a module that has no memory yet, and move the others to the device."""
    for name in [name for name, _ in module.named_modules()]:  # only names: a module kept here would keep its weights
        owner = module.get_submodule(name)
        stem = name.removeprefix(MODULE)
        for leaf, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_meta:
                values = _draw(f"{stem}.{leaf}", parameter.shape, device).to(dtype)
                owner._parameters[leaf] = nn.Parameter(values, requires_grad=False)
        for leaf, buffer in list(owner._buffers.items()):
            if buffer is not None:
                one = torch.ones if leaf == "running_var" else torch.zeros
                given = one(buffer.shape, dtype=buffer.dtype) if buffer.is_meta else buffer
                owner._buffers[leaf] = given.to(device)
        if recipe is not None and recipe in LINEARS and isinstance(owner, nn.Linear) and is_quantized(name):
            home, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(home), leaf, LINEARS[recipe](owner.weight))


def _draw(name: str, shape: torch.Size, device: str) -> Tensor:
    """Draw one tensor: matrices and kernels uniform within 1 / sqrt(inputs), norms as initialized, biases zero."""
    if len(shape) < 2:
        made = torch.zeros if name.endswith("bias") else torch.ones
        return made(shape, device=device)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) & _MASK)
    return torch.empty(shape, device=device, dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def inputs(part: PartName, variant: Variant, side: int, batch: int, compute: Compute, device: str) -> dict[str, Tensor]:
    """Return inputs of a part for square images: real ids, random values, a prompt of an eighth of the text length."""
    generator = torch.Generator("cpu").manual_seed(7)
    per = variant.pixels_per_token
    rows = side // per

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch_type(compute))

    match part:
        case "transformer":
            from pipeline.position_ids import image_ids, text_ids

            text = variant.text_tokens
            made = {
                "hidden_states": normal(batch, rows * rows, variant.transformer.channels),
                "encoder_hidden_states": normal(batch, text, variant.transformer.joint_dim),
                "timestep": torch.linspace(0.9, 0.5, batch, device=device),
                "img_ids": torch.from_numpy(image_ids(rows, rows)).expand(batch, -1, -1).to(device),
                "txt_ids": torch.from_numpy(text_ids(text)).expand(batch, -1, -1).to(device),
            }
            if variant.transformer.guidance_embeds:
                made["guidance"] = torch.full((batch,), variant.guidance_scale, device=device)
            return made
        case "text_encoder":
            text = variant.text_tokens
            ids = torch.randint(0, variant.text_encoder.vocab, (batch, text), generator=generator)
            mask = (torch.arange(text) < text // 8).long().expand(batch, -1)
            return {"input_ids": ids.to(device), "attention_mask": mask.contiguous().to(device)}
        case _:
            return {"latents": normal(batch, variant.transformer.channels, rows, rows)}
