"""Read the names, dtypes, shapes and byte ranges of the tensors in safetensors files without reading weights.

Format: 8 bytes little-endian header length, a JSON header, then the data; header offsets are relative to the data.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.dtypes import ITEM_BYTES
from kit.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as stored on disk; `offset` counts from the start of the file."""

    name: str
    dtype: str  # safetensors' name: F32, BF16, F8_E4M3, ...
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def _header(path: Path) -> tuple[dict[str, Any], bytes, int]:
    """Read and check a header; returns it parsed, its raw bytes, and the offset of the data."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):  # otherwise the kernel reads ahead into the weights
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)")
        raw = stream.read(length)
    try:
        header = json.loads(raw)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    return header, prefix + raw, 8 + length


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one safetensors file.

    Raises CheckpointError, naming the file and the tensor, for a truncated file, an unknown dtype, or a byte range that
    does not fit the shape.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    header, _, data = _header(path)
    size = path.stat().st_size
    tensors: dict[str, StoredTensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{path}: tensor {name!r} has a malformed header entry") from None
        if dtype not in ITEM_BYTES:
            raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(ITEM_BYTES)}")
        nbytes = math.prod(shape) * ITEM_BYTES[dtype]
        if begin < 0 or end - begin != nbytes:
            raise CheckpointError(
                f"{path}: tensor {name!r} of shape {list(shape)} {dtype} needs {nbytes} bytes, its range has "
                f"{end - begin}"
            )
        if data + end > size:
            raise CheckpointError(
                f"{path}: truncated: tensor {name!r} ends at byte {data + end}, the file has {size} bytes"
            )
        tensors[name] = StoredTensor(name, dtype, shape, path, data + begin, nbytes)
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """Return the free-form `__metadata__` of one safetensors file, empty if there is none."""
    header, _, _ = _header(path)
    metadata = header.get("__metadata__", {})
    return {str(k): str(v) for k, v in metadata.items()} if isinstance(metadata, dict) else {}


def header_digest(path: Path) -> str:
    """Return a digest of a safetensors file's header and size, so that 60 GB of weights need not be read.

    It covers names, dtypes, shapes, offsets and truncation, but not a change of weight values alone.
    """
    _, raw, _ = _header(path)
    return hashlib.sha256(raw + str(path.stat().st_size).encode()).hexdigest()


def read_folder(folder: Path, stems: tuple[str, ...] = ("diffusion_pytorch_model", "model")) -> dict[str, StoredTensor]:
    """List the tensors of one part of a checkpoint, sharded or not.

    `stems` are the file names that diffusers and transformers write, without ".safetensors". A shard index takes
    precedence over a single file. Raises CheckpointError for shards that are missing, contain a tensor twice, or
    disagree with the index, and for folders that hold only pickles.
    """
    for stem in stems:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return _read_sharded(index)
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            return read_header(single)
    pickles = sorted(p.name for p in folder.glob("*.bin")) if folder.is_dir() else []
    hint = f"; {', '.join(pickles)} is a pickle, which the kit does not load" if pickles else ""
    raise CheckpointError(f"{folder}: no {' or '.join(f'{s}.safetensors' for s in stems)}{hint}")


def _read_sharded(index: Path) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: not a shard index ({error!r})") from None
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if os.path.basename(shard) != shard:
            raise CheckpointError(f"{index}: shard {shard!r} is outside the folder")
        for name, tensor in read_header(index.parent / shard).items():
            if name in tensors:
                raise CheckpointError(f"{index}: tensor {name!r} is in both {tensors[name].file.name} and {shard}")
            tensors[name] = tensor
    missing = [name for name in weight_map if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{index}: tensor {missing[0]!r} is not in {weight_map[missing[0]]} ({len(missing)} missing)"
        )
    return tensors
