"""Hold constants that a graph module computes from its config, so that they survive a trace with fake tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Float32 = npt.NDArray[np.float32]
_SUFFIX = "_values"


def hold_constant(module: nn.Module, name: str, values: Float32) -> None:
    """Register an fp32 buffer, whatever the module's type, and keep its values as a NumPy array.

    The buffer is not persistent, because checkpoints do not contain it.
    """
    module.register_buffer(name, torch.tensor(values.tolist(), dtype=torch.float32), persistent=False)
    setattr(module, name + _SUFFIX, values)


def read_constant(module: nn.Module, name: str) -> Float32:
    """Return the values of a buffer made by `hold_constant`, even if the buffer itself is fake."""
    values: Any = getattr(module, name + _SUFFIX)
    assert isinstance(values, np.ndarray)
    return values
