"""bf16 between numpy and torch: numpy has no such type, so arrays carry ml_dtypes' and cross as 16-bit integers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from serve.engine import Array

if TYPE_CHECKING:
    import torch

BFLOAT16: Any = np.dtype(ml_dtypes.bfloat16)


def to_tensor(array: Array) -> torch.Tensor:
    """Return a tensor that shares an array's memory (a copy where the array is read-only or not contiguous)."""
    import torch

    array = np.require(array, requirements=["C", "W"])
    if array.dtype == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: torch.Tensor) -> Array:
    """Return an array that shares the memory of a tensor on the CPU."""
    import torch

    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(BFLOAT16)
    return np.asarray(tensor.numpy())
