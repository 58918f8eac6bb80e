"""Root-mean-square norms with fp32 statistics for activations of any type."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """Scale the last axis to unit mean square; the result is fp32.

    Written as basic operators because TensorRT supports RMSNormalization only since 10.15.
    """
    wide = as_type(x, torch.float32)
    mean_square = (wide * wide).mean(dim=-1, keepdim=True)
    return wide / torch.sqrt(mean_square + eps)


def rms_norm(weight: Tensor, x: Tensor, eps: float) -> Tensor:
    """Scale the last axis to unit mean square and multiply by a weight; the result is fp32."""
    return unit_rms(x, eps) * as_type(weight, torch.float32)


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast only if the type changes: a cast without effect still costs two nodes to trace."""
    return x if x.dtype == dtype else x.to(dtype)
