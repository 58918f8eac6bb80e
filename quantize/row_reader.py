"""Read rows of stored weights as fp32 into buffers that are reused, and run such work on one thread per core."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from kit.dtypes import torch_type
from kit.errors import ArtifactError
from kit.safetensors_file import StoredTensor


class Workspace(threading.local):
    """Buffers of one thread, used again for every piece: allocating them costs more than the arithmetic on them."""

    raw = bytearray()
    floats = torch.empty(0)
    magnitudes = torch.empty(0)


def read_rows(source: StoredTensor, begin: int, end: int, workspace: Workspace | None = None) -> Tensor:
    """Read rows `begin` to `end` of a stored tensor as fp32.

    With a workspace the result is valid until the same thread reads again. Raises ArtifactError for a truncated file.
    """
    space = workspace or Workspace()
    row_bytes = source.nbytes // source.shape[0]
    wanted = (end - begin) * row_bytes
    if len(space.raw) < wanted:
        space.raw = bytearray(wanted)
    with source.file.open("rb", buffering=0) as stream:
        stream.seek(source.offset + begin * row_bytes)
        view = memoryview(space.raw)[:wanted]
        while view:
            count = stream.readinto(view)
            if not count:
                raise ArtifactError(f"{source.file}: ends within tensor {source.name!r}; the file is truncated")
            view = view[count:]
    dtype = torch_type(source.dtype)
    stored = torch.frombuffer(space.raw, dtype=dtype, count=wanted // dtype.itemsize)
    if len(space.floats) < len(stored):
        space.floats, space.magnitudes = torch.empty(len(stored)), torch.empty(len(stored))
    values = space.floats[: len(stored)].view(end - begin, *source.shape[1:])
    return values.copy_(stored.view(values.shape))


@contextmanager
def one_thread_per_core() -> Iterator[ThreadPoolExecutor]:
    """Provide a pool with one thread per core, in which torch's operators do not spawn threads themselves.

    An operator that is spread over all cores waits for the slowest one, thousands of times a second; independent pieces
    do not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
            yield pool
    finally:
        torch.set_num_threads(threads)
