"""Measure how much of a file is in the page cache, that is, how much was read since its pages were dropped."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_LIBC.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
_LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_SHARED = 1
_CHUNK = 1 << 34  # bytes mapped at a time


def drop(path: Path) -> None:
    """Ask the kernel to drop a file's pages."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident_bytes(path: Path) -> int:
    """Count the bytes of a file that are in the page cache, in whole pages (Linux mincore)."""
    size, total = path.stat().st_size, 0
    with path.open("rb") as stream:
        for start in range(0, size, _CHUNK):
            length = min(_CHUNK, size - start)
            address = _LIBC.mmap(None, length, mmap.PROT_READ, _SHARED, stream.fileno(), start)
            if address == ctypes.c_void_p(-1).value:
                raise OSError(ctypes.get_errno(), "mmap failed", str(path))
            pages = ctypes.create_string_buffer(-(-length // mmap.PAGESIZE))
            try:
                if _LIBC.mincore(address, length, pages):
                    raise OSError(ctypes.get_errno(), "mincore failed", str(path))
            finally:
                _LIBC.munmap(address, length)
            total += sum(byte & 1 for byte in pages.raw) * mmap.PAGESIZE
    return total
