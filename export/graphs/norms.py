"""Root-mean-square norm with statistics in fp32, whatever type the activations have."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """Scale the last axis to unit mean square; the result is fp32.

    Written out rather than as RMSNormalization, which TensorRT knows since 10.15 only.
    """
    wide = as_type(x, torch.float32)
    mean_square = (wide * wide).mean(dim=-1, keepdim=True)
    return wide / torch.sqrt(mean_square + eps)


def rms_norm(weight: Tensor, x: Tensor, eps: float) -> Tensor:
    """Scale the last axis to unit mean square, times a weight; the result is fp32."""
    return unit_rms(x, eps) * as_type(weight, torch.float32)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast where it changes something: even a cast that does nothing costs two nodes to trace."""
    return x if x.dtype == dtype else x.to(dtype)
