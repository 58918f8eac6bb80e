"""Byte ranges of safetensors files, and the files that are rejected."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from kit import safetensors_file
from kit.errors import CheckpointError

VALUES: dict[str, np.ndarray[Any, Any]] = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b.weight": np.ones(4, np.float16),
}


def write(path: Path) -> Path:
    save_file(VALUES, path, metadata={"made": "here"})
    return path


def test_a_byte_range_holds_the_tensor(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    stored = safetensors_file.read_header(path)
    assert set(stored) == set(VALUES)
    for name, tensor in stored.items():
        raw = path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
        assert np.array_equal(np.frombuffer(raw, VALUES[name].dtype).reshape(tensor.shape), VALUES[name])


def test_metadata_is_read(tmp_path: Path) -> None:
    assert safetensors_file.read_metadata(write(tmp_path / "model.safetensors")) == {"made": "here"}


def test_the_digest_sees_a_truncation_and_not_the_weights(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    digest = safetensors_file.header_digest(path)
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert safetensors_file.header_digest(path) == digest
    path.write_bytes(raw[:-1])
    assert safetensors_file.header_digest(path) != digest


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234", "truncated: tensor 'a' ends at byte"),
        ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"12345678", r"\[3\] F32 needs 12 bytes"),
        ({"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}, b"12345678", "dtype 'C64'; known: F64"),
        ({"a": {"dtype": "F32"}}, b"", "tensor 'a' has a malformed header entry"),
        ([1], b"", "header is not a JSON object"),
    ],
)
def test_a_wrong_header_is_refused_by_tensor(header: object, data: bytes, message: str, tmp_path: Path) -> None:
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    with pytest.raises(CheckpointError, match=message):
        safetensors_file.read_header(path)


@pytest.mark.parametrize("raw", [b"", b"1234", (2**40).to_bytes(8, "little"), (100).to_bytes(8, "little") + b"{}"])
def test_a_file_that_is_no_safetensors_is_refused(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"model.safetensors: truncated or not a safetensors file"):
        safetensors_file.read_header(path)


def sharded(folder: Path, weight_map: dict[str, str]) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    for number, (name, value) in enumerate(VALUES.items()):
        save_file({name: value}, tmp_path / f"model-{number}.safetensors")
    found = safetensors_file.read_folder(
        sharded(tmp_path, {"a.weight": "model-0.safetensors", "b.weight": "model-1.safetensors"})
    )
    assert {name: tensor.file.name for name, tensor in found.items()} == {
        "a.weight": "model-0.safetensors",
        "b.weight": "model-1.safetensors",
    }


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="model-9.safetensors: missing"):
        safetensors_file.read_folder(sharded(tmp_path, {"a.weight": "model-9.safetensors"}))


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path: Path) -> None:
    write(tmp_path / "model-0.safetensors")
    folder = sharded(tmp_path, {"a.weight": "model-0.safetensors", "c.weight": "model-0.safetensors"})
    with pytest.raises(CheckpointError, match="tensor 'c.weight' is not in model-0.safetensors"):
        safetensors_file.read_folder(folder)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"shard '../x.safetensors' is outside the folder"):
        safetensors_file.read_folder(sharded(tmp_path, {"a.weight": "../x.safetensors"}))


def test_a_pickle_is_not_loaded(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin is a pickle, which the kit does not load"):
        safetensors_file.read_folder(tmp_path)
