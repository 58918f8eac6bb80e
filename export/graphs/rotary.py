"""Rotary position embedding in fp32 from integer ids, as accurate as diffusers' float64 without a DOUBLE tensor.

An angle is id * frequency. In fp32 its error grows with the angle (511 rad: 3e-5), and the fast sines of some GPUs are
inaccurate far from zero. The angle is therefore counted in turns and the frequency is split into its 11 leading bits
and the rest. The products id * leading bits are exact for ids below 8192, and whole turns are dropped before
multiplying by 2 pi.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.graphs.axes import join_axes, split_axis

Rope = tuple[Tensor, Tensor]  # cosines, and sines with the sign of their term, each [B, S, 1, D]
LEADING_BITS = 11  # 24 bits of an fp32 mantissa minus the 13 bits of the largest id


def turns_per_id(theta: float, dim: int) -> npt.NDArray[np.float32]:
    """Return theta^(-2i/dim) / 2 pi for i < dim / 2, split into two fp32 numbers with that sum, [2, dim / 2]."""
    exact = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) / (2 * math.pi)
    mantissa, exponent = np.frexp(exact)
    leading = np.ldexp(np.floor(np.ldexp(mantissa, LEADING_BITS)), exponent - LEADING_BITS)
    split: npt.NDArray[np.float32] = np.stack([leading, exact - leading]).astype(np.float32)
    return split


def angles(ids: Tensor, turns: Tensor) -> Tensor:
    """Return the angles [B, S, A * F] of ids [B, S, A] at F frequencies `turns` [2, F], fp32, within 1.5 turns of 0."""
    positions = ids.to(torch.float32).unsqueeze(-1)  # [B, S, A, 1]
    leading = positions * turns[0]
    part = (leading - leading.round()) + positions * turns[1]
    return join_axes(part * (2 * math.pi), -2, -1)


def rope_of_pairs(angle: Tensor) -> Rope:
    """Prepare angles [B, S, D / 2] for `rotate_pairs`."""
    cos, sin = angle.cos(), angle.sin()
    cosines, sines = (join_axes(torch.stack(pair, dim=-1), -2, -1) for pair in ([cos, cos], [-sin, sin]))
    return cosines.unsqueeze(2), sines.unsqueeze(2)


def rope_of_halves(angle: Tensor) -> Rope:
    """Prepare angles [B, S, D / 2] for `rotate_halves`."""
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], dim=-1).unsqueeze(2), torch.cat([-sin, sin], dim=-1).unsqueeze(2)


def scaled(rope: Rope, factor: float) -> Rope:
    """Scale the rotated result by a factor, so that the scale of attention costs no node in any block."""
    cos, sin = rope
    return cos * factor, sin * factor


def rotate_pairs(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the pairs (2i, 2i + 1) of the last axis of x [B, S, H, D], the layout of FLUX.2."""
    cos, sin = rope
    even, odd = split_axis(x, -1, x.shape[-1] // 2, 2).chunk(2, dim=-1)  # [B, S, H, D / 2, 1]
    return x * cos + join_axes(torch.cat([odd, even], dim=-1), -2, -1) * sin


def rotate_halves(x: Tensor, rope: Rope) -> Tensor:
    """Rotate the pairs (i, i + D / 2) of the last axis of x [B, S, H, D], the layout of the language models."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * sin
