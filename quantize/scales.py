"""The arithmetic of quantization: scales and rounding of weights, per tensor, per channel or per block.

Symmetric everywhere, because TensorRT wants zero points of zero: int8 codes -127 to 127, int4 -7 to 7, FP8 E4M3 up to
448. A value is divided by its scale by multiplying with the reciprocal and rounded to the nearest, ties to even: the
arithmetic of torchao's quantization primitives, with which a test compares it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from kit.recipes import Number

LARGEST: Mapping[Number, float] = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
SMALLEST_SCALE = 2.0**-100  # of a row of zeros or near zeros; a scale must be positive


class NotFinite(ValueError):
    """A weight holds NaN or an infinity."""


def amax(values: Tensor, dim: int | None = None, scratch: Tensor | None = None) -> Tensor:
    """Return the largest magnitude, of all values or along `dim`; raises NotFinite for NaN and infinity.

    `scratch`, of at least as many values, takes the magnitudes: fresh memory costs more than the arithmetic.
    """
    # abs and amax are together many times as fast as torch's infinity norm
    magnitudes = values.abs() if scratch is None else torch.abs(values, out=scratch[: values.numel()].view_as(values))
    largest = magnitudes.amax() if dim is None else magnitudes.amax(dim)
    if not torch.isfinite(largest).all():
        raise NotFinite("holds NaN or an infinity")
    return largest


def scale_of(largest: Tensor, number: Number) -> Tensor:
    """Return the scale with which the largest magnitude becomes the largest code; zeros get scale 1."""
    scale = torch.where(largest > 0, largest / LARGEST[number], torch.ones_like(largest))
    return scale.clamp_(min=SMALLEST_SCALE)


def encode(values: Tensor, scale: Tensor, number: Number) -> Tensor:
    """Divide by the scale (which broadcasts) and round to codes: float8_e4m3fn, or int8, int4 in int8.

    `values` are overwritten.
    """
    codes = values.mul_(scale.reciprocal())
    codes.clamp_(-LARGEST[number], LARGEST[number])
    if number == "fp8":
        return codes.to(torch.float8_e4m3fn)
    return codes.round_().to(torch.int8)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 values that codes stand for."""
    return codes.to(torch.float32) * scale


def pack_int4(codes: Tensor) -> Tensor:
    """Pack int4 codes [..., N] held in int8 into bytes [..., N / 2], the first in the low half as ONNX has it."""
    pairs = codes.view(*codes.shape[:-1], -1, 2).to(torch.uint8)
    return (pairs[..., 0] & 0x0F) | (pairs[..., 1] << 4)
