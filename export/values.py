"""Convert rows of stored tensors to fp32 values, and fp32 values to stored bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kit.dtypes import numpy_type
from kit.safetensors_file import StoredTensor

Float32 = npt.NDArray[np.float32]
READABLE = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")  # types that rows can be read from


def read_rows(tensor: StoredTensor, begin: int, end: int) -> Float32:
    """Read rows `begin` to `end` of a tensor of any shape as fp32; a scalar counts as one row."""
    rows = tensor.shape[0] if tensor.shape else 1
    assert 0 <= begin <= end <= rows
    row_bytes = tensor.nbytes // rows
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.offset + begin * row_bytes)
        raw = stream.read((end - begin) * row_bytes)
    values = np.frombuffer(raw, numpy_type(tensor.dtype)).reshape((end - begin, *tensor.shape[1:]))
    return values.astype(np.float32)


def read_all(tensor: StoredTensor) -> Float32:
    """Read a whole tensor as fp32."""
    rows = tensor.shape[0] if tensor.shape else 1
    return read_rows(tensor, 0, rows).reshape(tensor.shape)


def as_stored(values: Float32, dtype: str) -> bytes:
    """Round fp32 once to a stored type, to nearest with ties to even; values out of range become infinite."""
    with np.errstate(over="ignore"):
        stored: npt.NDArray[Any] = values.astype(numpy_type(dtype))
    return stored.tobytes()
