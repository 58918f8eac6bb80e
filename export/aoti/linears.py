"""Quantized linear layers in plain torch, for packages that run without an ONNX runtime.

    fp8           E4M3 weights with a scale per output row, activations with a scale per token, one fp8 product
    int8          the same in INT8 with an INT32 sum
    int8-weights  INT8 weights with a scale per row, the product in the compute type

Activations are scaled dynamically, so no calibration is needed; the compiler fuses the scales and casts, which are
elementwise, into the operator that produces the activations. Weights are quantized once, with one scale per row from
its largest absolute value.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from kit.errors import UsageError

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite E4M3 value
INT8_MAX = 127.0
TINY = 1e-12  # avoids a division by zero for a row of zeros
IN_BLOCKS = re.compile(r"(^|\.)(transformer_blocks|single_transformer_blocks|layers)\.")


class QuantizedLinear(nn.Module):
    """y = x W^T with W stored in 8 bits and one scale per output row."""

    weight: Tensor  # [N, K]
    scale: Tensor  # [N], fp32

    def __init__(self, weight: Tensor, largest: float, dtype: torch.dtype) -> None:
        super().__init__()
        stored, scale = to_rows(weight, largest, dtype)
        self.register_buffer("weight", stored)
        self.register_buffer("scale", scale.squeeze(-1))


class Fp8Linear(QuantizedLinear):
    """FP8 weights and activations."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, FP8_MAX, FP8)

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = to_rows(x.reshape(-1, x.shape[-1]), FP8_MAX, FP8)  # [M, K], [M, 1]
        y = torch._scaled_mm(
            rows,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale.unsqueeze(0),
            out_dtype=x.dtype,
            use_fast_accum=True,  # accumulates in the tensor core's own precision, as public FP8 timings do
        )
        return y.reshape(*x.shape[:-1], y.shape[-1])


class Int8Linear(QuantizedLinear):
    """INT8 weights and activations."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, INT8_MAX, torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = to_rows(x.reshape(-1, x.shape[-1]), INT8_MAX, torch.int8)
        y = torch._int_mm(rows, self.weight.t()) * scale * self.scale
        return y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])


class Int8WeightLinear(QuantizedLinear):
    """INT8 weights; the product is computed in the type of the activations."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, INT8_MAX, torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)


LINEARS: Mapping[str, Callable[[Tensor], QuantizedLinear]] = {
    "fp8": Fp8Linear,
    "int8": Int8Linear,
    "int8-weights": Int8WeightLinear,
}


def to_rows(x: Tensor, largest: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Quantize the rows of a matrix; returns the stored rows and their scales, fp32 [..., 1]."""
    wide = x.float()
    scale = wide.abs().amax(dim=-1, keepdim=True).clamp(min=TINY) / largest
    steps = (wide / scale).clamp(-largest, largest)
    return (steps.round() if dtype == torch.int8 else steps).to(dtype), scale


def is_quantized(name: str) -> bool:
    """Return whether recipes quantize the linear layer of this name: only layers of the blocks."""
    return IN_BLOCKS.search(name) is not None


def quantize_linears(module: nn.Module, recipe: str) -> int:
    """Replace the linear layers of all blocks by quantized ones, one at a time; returns the number replaced.

    Raises UsageError for a recipe that is not available in torch.
    """
    if recipe not in LINEARS:
        raise UsageError(f"recipe {recipe!r} is not available in torch; there are: bf16, fp32, {', '.join(LINEARS)}")
    replaced = 0
    for name, linear in list(module.named_modules()):
        if isinstance(linear, nn.Linear) and is_quantized(name):
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, LINEARS[recipe](linear.weight))
            replaced += 1
    return replaced
