"""The safetensors writer: its files are read by the reference implementation, whatever the order of the pieces."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from kit.safetensors_file import read_header
from kit.safetensors_writer import Piece, Slot, reserve, write

VALUES: dict[str, Any] = {
    "a": np.arange(300, dtype=np.float32).reshape(3, 100),
    "b": np.arange(7, dtype=np.uint8),
    "c": np.float32(2),
}
SLOTS = [Slot("a", "F32", (3, 100)), Slot("b", "U8", (7,)), Slot("c", "F32", ())]


def pieces(size: int) -> list[Piece]:
    raw = {name: np.asarray(value).tobytes() for name, value in VALUES.items()}
    return [
        (name, begin, content[begin : begin + size])
        for name, content in raw.items()
        for begin in range(0, len(content), size)
    ]


@pytest.mark.parametrize("size", [1, 5, 4096])
def test_pieces_in_any_order_give_the_same_file(tmp_path: Path, size: int) -> None:
    ordered, shuffled = pieces(4096), pieces(size)
    random.Random(size).shuffle(shuffled)
    places = write(tmp_path / "a.safetensors", SLOTS, ordered)
    write(tmp_path / "b.safetensors", SLOTS, shuffled)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert places == read_header(tmp_path / "a.safetensors")
    found = load_file(tmp_path / "b.safetensors")
    assert all(np.array_equal(found[name], value) for name, value in VALUES.items())


@pytest.mark.parametrize("multiple", [8, 64])
def test_the_length_of_the_header_is_a_multiple(tmp_path: Path, multiple: int) -> None:
    path = tmp_path / "a.safetensors"
    places = write(path, SLOTS, pieces(4096), multiple)
    assert int.from_bytes(path.read_bytes()[:8], "little") % multiple == 0
    assert places["a"].offset == 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert [place.name for place in places.values()] == ["a", "b", "c"]
    assert places["c"].offset == places["b"].offset + 7


def test_a_reserved_file_has_its_full_size_and_reads_as_zeros(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    reserve(path, [Slot("a", "F32", (1 << 20,))])
    assert path.stat().st_blocks * 512 < 1 << 20 < path.stat().st_size
    assert not load_file(path)["a"].any()


def test_two_tensors_of_one_name_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.safetensors: two tensors have the name 'b'"):
        reserve(tmp_path / "a.safetensors", [*SLOTS, Slot("b", "F32", ())])


def test_a_piece_that_does_not_fit_its_tensor_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor 'b' has 7 bytes, a piece goes from 4 to 8"):
        write(tmp_path / "a.safetensors", SLOTS, [("b", 4, b"1234")])


def test_a_tensor_without_all_of_its_bytes_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor 'b' has 7 bytes, 0 were written"):
        write(tmp_path / "a.safetensors", SLOTS, [piece for piece in pieces(4096) if piece[0] != "b"])
