"""Write full-size checkpoints with random weights, for measurements that do not depend on the values.

Matrices are normal with deviation 1 / sqrt(inputs), norms and batch-norm variances are one. One block of normal numbers
is drawn and reused from a different offset for every tensor, so that 8 GB take seconds instead of minutes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from benchmarks import sparse
from kit.dtypes import numpy_type
from kit.safetensors_file import StoredTensor, read_header
from kit.variants import Variant

BLOCK = (1 << 22) + 3  # odd, so that rows of a matrix do not repeat at the same columns


def write(variant: Variant, folder: Path, seed: int = 0) -> Path:
    """Write a bf16 checkpoint in diffusers layout; the result of an earlier call is kept."""
    done = folder / ".random"
    if done.is_file():
        return folder
    sparse.write(variant, folder)
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(BLOCK, dtype=np.float32)
    for file in sorted(folder.rglob("*.safetensors")):
        with file.open("r+b") as stream:
            for tensor in read_header(file).values():
                stream.seek(tensor.offset)
                _fill(stream, tensor, normal, int(rng.integers(BLOCK)))
    done.touch()
    return folder


def _fill(stream: BinaryIO, tensor: StoredTensor, normal: Any, start: int) -> None:
    count = math.prod(tensor.shape)
    if tensor.dtype != "BF16":
        return  # the counter of the batch norm
    if len(tensor.shape) < 2:
        value = 0.0 if tensor.name.endswith(("bias", "running_mean")) else 1.0
        stream.write(_bf16(np.full(count, value, np.float32)).tobytes())
        return
    scaled = _bf16(normal * np.float32(1 / math.sqrt(math.prod(tensor.shape[1:]))))
    while count:
        piece = scaled[start : start + count]
        stream.write(piece.tobytes())
        count, start = count - len(piece), 0


def _bf16(values: Any) -> Any:
    return values.astype(numpy_type("bf16"))
