"""Read the names, dtypes, shapes and byte ranges of the tensors in safetensors files without reading weights.

Format: 8 bytes little-endian header length, a JSON header, then the data; header offsets are relative to the data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from kit.dtypes import ITEM_BYTES
from kit.errors import CheckpointError
from kit.json_object import read_object

logger = logging.getLogger(__name__)
UNREADABLE = {  # types of the format that no step of the kit reads, and where they come from
    "F4": "4-bit floats are those of NVFP4 and MXFP4 files, which cannot be exported: use the BF16 or FP8 file",
    "F6_E2M3": "6-bit floats cannot be exported: use the BF16 or FP8 file",
    "F6_E3M2": "6-bit floats cannot be exported: use the BF16 or FP8 file",
    "F8_E8M0": "scales that are powers of two are those of MXFP8 and MXFP4 files, which cannot be exported: use the "
    "BF16 or FP8 file",
    "F8_E4M3FNUZ": "this FP8 is that of other makers' GPUs: use the BF16 file",
    "F8_E5M2FNUZ": "this FP8 is that of other makers' GPUs: use the BF16 file",
    "C64": "weights are not complex numbers",
}
OTHER_FORMATS = {
    ".bin": "a pickle, which the kit does not load",
    ".pt": "a pickle, which the kit does not load",
    ".pth": "a pickle, which the kit does not load",
    ".ckpt": "a pickle, which the kit does not load",
    ".gguf": "a GGUF file, which the kit does not read",
}
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
    stored_name: str = ""  # the name in the file, if the tensor was renamed

    @property
    def key(self) -> str:
        """Return the name in the file, for messages."""
        return self.stored_name or self.name

    def renamed(self, name: str) -> StoredTensor:
        """Return the tensor under another name; messages keep the one in the file."""
        return replace(self, name=name, stored_name=self.key)


def _header(path: Path) -> tuple[dict[str, Any], bytes, int]:
    """Read and check a header; returns it parsed, its raw bytes, and the offset of the data."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as stream:
        if hasattr(os, "posix_fadvise"):  # otherwise the kernel reads ahead into the weights
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        prefix = stream.read(8)
        if other := _other_format(prefix):
            raise CheckpointError(f"{path}: is {other}; use the safetensors file of the model")
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes)")
        raw = stream.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=lambda pairs: _unique(path, pairs))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    return header, prefix + raw, 8 + length


def check_format(path: Path) -> None:
    """Raise CheckpointError for a file in another format in which weights are distributed, by its first bytes."""
    with path.open("rb") as stream:
        if other := _other_format(stream.read(8)):
            raise CheckpointError(f"{path}: is {other}; use the safetensors file of the model")


def _other_format(start: bytes) -> str | None:
    """Recognize the other formats in which weights are distributed by the first bytes of a file."""
    if start.startswith(b"GGUF"):
        return "a GGUF file, whose quantized blocks the kit does not read"
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return "a pickle (a PyTorch .pt, .bin or .ckpt file), which can run code when it is loaded"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file"
    if start.startswith(b"version "):
        return "a pointer of Git LFS and not the file itself (git lfs pull)"
    return None


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object of the header, in which the reader of another library might take the first of two equal keys."""
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, _ in pairs if [k for k, _ in pairs].count(key) > 1)
        raise CheckpointError(f"{path}: the safetensors header has the key {twice!r} twice")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of one safetensors file.

    Raises CheckpointError, naming the file and the tensor, for a truncated file, an unknown dtype, or a byte range that
    does not fit the shape.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: missing")
    header, _, data = _header(path)
    size = path.stat().st_size
    return {name: _tensor(path, name, entry, data, size) for name, entry in header.items() if name != "__metadata__"}


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> StoredTensor:
    """Check one entry of a header."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        raise CheckpointError(f"{path}: tensor {name!r} has a malformed header entry")
    dtype, shape, offsets = entry["dtype"], entry.get("shape"), entry.get("data_offsets")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{path}: tensor {name!r} has a malformed header entry")
    if dtype not in ITEM_BYTES:
        more = f"; {UNREADABLE[dtype]}" if dtype in UNREADABLE else ""
        raise CheckpointError(f"{path}: tensor {name!r} has dtype {dtype!r}; known: {', '.join(ITEM_BYTES)}{more}")
    begin, end = offsets
    nbytes = math.prod(shape) * ITEM_BYTES[dtype]
    if end - begin != nbytes:
        raise CheckpointError(
            f"{path}: tensor {name!r} of shape {list(shape)} {dtype} needs {nbytes} bytes, its range has {end - begin}"
        )
    if data + end > size:
        raise CheckpointError(
            f"{path}: truncated: tensor {name!r} ends at byte {data + end}, the file has {size} bytes"
        )
    return StoredTensor(name, dtype, tuple(shape), path, data + begin, nbytes)


def _counts(value: object) -> TypeGuard[list[int]]:
    """Return whether a value of a header is a list of whole numbers that are not negative."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


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


STEMS = ("diffusion_pytorch_model", "model")  # the file names that diffusers and transformers write
_WEIGHTS = re.compile(
    rf"({'|'.join(STEMS)})"
    r"(?:\.(?P<before>(?!safetensors\b)[\w-]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<shard>(?!safetensors\b)[\w-]+))?"
    r"\.safetensors(?:\.index(?:\.(?P<index>\w+))?\.json)?"
)


def read_folder(folder: Path, variant: str | None = None) -> dict[str, StoredTensor]:
    """List the tensors of one part of a checkpoint, sharded or not.

    `variant` chooses files such as model.bf16.safetensors; without it, the files without a variant are read, or the one
    variant there is. A shard index takes precedence over a single file. Raises CheckpointError for shards that are
    missing, contain a tensor twice, or disagree with the index, for several variants to choose from, and for folders
    that hold only files in other formats.
    """
    found = _variants(folder)
    if variant is None and "" not in found and len(found) > 1:
        raise CheckpointError(
            f"{folder}: has weights in several variants; choose one with --variant {' or '.join(sorted(found))}"
        )
    chosen = variant if variant in found else "" if "" in found else next(iter(found), "")
    if variant is not None and found and variant not in found:
        if set(found) != {""}:
            there = ", ".join(name or "one without a name" for name in sorted(found))
            raise CheckpointError(f"{folder}: has no variant {variant!r}; there are: {there}")
        logger.warning("%s: has no variant %r; its only weights are read", folder, variant)
    for name in found.get(chosen, ()):
        return _read_sharded(folder / name) if name.endswith(".json") else read_header(folder / name)
    others = sorted(p.name for p in folder.iterdir() if p.suffix in OTHER_FORMATS) if folder.is_dir() else []
    hint = f"; {', '.join(others)} is {OTHER_FORMATS[Path(others[0]).suffix]}" if others else ""
    raise CheckpointError(f"{folder}: no {' or '.join(f'{stem}.safetensors' for stem in STEMS)}{hint}")


def _variants(folder: Path) -> dict[str, list[str]]:
    """List the weight files of a folder by variant, "" for none: indexes first; shards are named by their index."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = _WEIGHTS.fullmatch(path.name)
        if match and (path.name.endswith(".json") or not re.search(r"-\d{5}-of-\d{5}", path.name)):
            found.setdefault(match["before"] or match["shard"] or match["index"] or "", []).append(path.name)
    return {
        variant: sorted(names, key=lambda name: (not name.startswith(STEMS[0]), not name.endswith(".json"), name))
        for variant, names in found.items()
    }


def _read_sharded(index: Path) -> dict[str, StoredTensor]:
    raw = read_object(index)
    weight_map = raw.object("weight_map")
    if weight_map is None:
        raise CheckpointError(f"{index}: not a shard index ('weight_map' is missing)")
    shards = {name: weight_map.text(name) for name in weight_map.values}
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shards.values())):
        if os.path.basename(shard) != shard or shard in ("", ".", "..") or "\0" in shard or len(shard) > 255:
            raise CheckpointError(f"{index}: shard {shard!r} is outside the folder")
        for name, tensor in read_header(index.parent / shard).items():
            if name in tensors:
                raise CheckpointError(f"{index}: tensor {name!r} is in both {tensors[name].file.name} and {shard}")
            tensors[name] = tensor
    missing = [name for name in shards if name not in tensors]
    if missing:
        raise CheckpointError(f"{index}: tensor {missing[0]!r} is not in {shards[missing[0]]} ({len(missing)} missing)")
    return tensors
