"""Compute scales and round weights to codes, per tensor, per channel or per block.

Quantization is symmetric, because TensorRT requires zero points of zero: int8 codes go from -127 to 127, int4 from -7
to 7, FP8 E4M3 up to 448. Values are multiplied by the reciprocal of the scale and rounded to nearest, ties to even, as
in torchao's quantization primitives; a test compares the results.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kit.recipes import Number

LARGEST: Mapping[Number, float] = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
SMALLEST_SCALE = 2.0**-100  # for rows of values near zero; a scale must be positive


class NotFinite(ValueError):
    """A weight contains NaN or infinity."""


def amax(values: Tensor, dim: int | None = None, scratch: Tensor | None = None) -> Tensor:
    """Return the largest magnitude of all values, or along `dim`; raises NotFinite for NaN and infinity.

    `scratch` is a buffer for at least as many values: allocating one costs more than the arithmetic.
    """
    # abs and amax together are many times faster than torch's infinity norm
    magnitudes = values.abs() if scratch is None else torch.abs(values, out=scratch[: values.numel()].view_as(values))
    largest = magnitudes.amax() if dim is None else magnitudes.amax(dim)
    if not torch.isfinite(largest).all():
        raise NotFinite("contains NaN or infinity")
    return largest


def scale_of(largest: Tensor, number: Number) -> Tensor:
    """Return the scale that maps the largest magnitude to the largest code; 1 if it is zero."""
    scale = torch.where(largest > 0, largest / LARGEST[number], torch.ones_like(largest))
    return scale.clamp_(min=SMALLEST_SCALE)


def encode(values: Tensor, scale: Tensor, number: Number) -> Tensor:
    """Divide by the scale, which broadcasts, and round to codes: float8_e4m3fn, or int8 for int8 and int4.

    `values` are overwritten.
    """
    codes = values.mul_(scale.reciprocal())
    codes.clamp_(-LARGEST[number], LARGEST[number])
    if number == "fp8":
        return codes.to(torch.float8_e4m3fn)
    return codes.round_().to(torch.int8)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 values that codes represent."""
    return codes.to(torch.float32) * scale


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int4 codes [..., N], stored as int8, into bytes [..., N / 2], the first in the low half as in ONNX."""
    pairs = codes.view(*codes.shape[:-1], -1, 2).to(torch.uint8)
    return (pairs[..., 0] & 0x0F) | (pairs[..., 1] << 4)
