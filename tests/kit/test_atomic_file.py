"""Files that appear complete or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from kit.atomic_file import write_file


@pytest.mark.parametrize("content", [b"\x00new", "new \u00fc"])
def test_content_is_replaced_and_nothing_else_remains(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    write_file(path, content, sync=True)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert os.listdir(tmp_path) == ["file"]


def test_a_failed_write_keeps_the_old_content_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(path, "new", sync=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_reader_never_sees_a_part_of_what_threads_write(tmp_path: Path) -> None:
    path, size = tmp_path / "file", 200_000
    write_file(path, b"0" * size)

    def write_often(digit: bytes) -> None:
        for _ in range(20):
            write_file(path, digit * size)

    threads = [threading.Thread(target=write_often, args=(digit,)) for digit in (b"1", b"2")]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        seen = path.read_bytes()
        assert seen == seen[:1] * size
    for thread in threads:
        thread.join()
    assert os.listdir(tmp_path) == ["file"]
