"""Numbers that a graph module computes from its config: they must outlive a trace in which every tensor is fake."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Float32 = npt.NDArray[np.float32]
_SUFFIX = "_values"


def hold_constant(module: nn.Module, name: str, values: Float32) -> None:
    """Give a module a buffer, fp32 whatever the module's type, and keep its numbers beside it.

    The buffer is not persistent: no checkpoint has it.
    """
    module.register_buffer(name, torch.tensor(values.tolist(), dtype=torch.float32), persistent=False)
    setattr(module, name + _SUFFIX, values)


def read_constant(module: nn.Module, name: str) -> Float32:
    """Return the numbers of a buffer that `hold_constant` made, also when the buffer itself is fake."""
    values: Any = getattr(module, name + _SUFFIX)
    assert isinstance(values, np.ndarray)
    return values
