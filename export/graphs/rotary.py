"""Rotary position embedding in fp32 from integer ids, as accurate as diffusers' float64 without a DOUBLE tensor.

An angle is id * frequency. In fp32 its error grows with the angle (511 rad: 3e-5), and some GPUs have fast sines that
are poor far from zero. So the angle is counted in turns, the frequency is split into 11 leading bits and the rest, the
products id * leading bits are exact for ids below 8192, and whole turns are dropped before 2 pi is multiplied in.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from export.graphs.axes import join_axes, split_axis

Rope = tuple[Tensor, Tensor]  # cosines, and sines with the sign of the term they make, each [B, S, 1, D]
LEADING_BITS = 11  # 24 bits of an fp32 mantissa less the 13 bits of the largest id


def turns_per_id(theta: float, dim: int) -> npt.NDArray[np.float32]:
    """Return theta^(-2i/dim) / 2 pi for i < dim / 2, split in two fp32 numbers that add up to it, [2, dim / 2]."""
    exact = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim) / (2 * math.pi)
    mantissa, exponent = np.frexp(exact)
    leading = np.ldexp(np.floor(np.ldexp(mantissa, LEADING_BITS)), exponent - LEADING_BITS)
    split: npt.NDArray[np.float32] = np.stack([leading, exact - leading]).astype(np.float32)
    return split


def angles(ids: Tensor, turns: Tensor) -> Tensor:
    """Return angles [B, S, A * F] of ids [B, S, A] at the F frequencies `turns` [2, F], fp32, within 1.5 turns of 0."""
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
    """Multiply by a factor what is rotated with the result: the scale of attention, without a node in any block."""
    cos, sin = rope
    return cos * factor, sin * factor


def rotate_pairs(x: Tensor, rope: Rope) -> Tensor:
    """Turn the pairs (2i, 2i + 1) of the last axis of x [B, S, H, D]: FLUX.2's layout."""
    cos, sin = rope
    even, odd = split_axis(x, -1, x.shape[-1] // 2, 2).chunk(2, dim=-1)  # [B, S, H, D / 2, 1]
    return x * cos + join_axes(torch.cat([odd, even], dim=-1), -2, -1) * sin


def rotate_halves(x: Tensor, rope: Rope) -> Tensor:
    """Turn the pairs (i, i + D / 2) of the last axis of x [B, S, H, D]: the language models' layout."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([second, first], dim=-1) * sin
