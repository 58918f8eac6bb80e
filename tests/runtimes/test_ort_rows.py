"""Rows of a call side by side: the same bits as in one call, the faster session for one row, and failures that wait."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from kit.artifact import read_manifest
from runtimes.ort.engine import CPU, OrtEngine, open_session, session_options
from runtimes.ort.rows import AGAIN, TRIALS, SideBySide
from tests.runtimes.test_ort_panels import feeds

Array = npt.NDArray[Any]


class Session:
    """Doubles x in so many seconds, and counts its calls; fails on negative values."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.rows: list[int] = []
        self.running = 0
        self.together = 0
        self._lock = threading.Lock()

    def run(self, outputs: Sequence[str], inputs: Mapping[str, Array]) -> list[Array]:
        with self._lock:
            self.rows.append(len(inputs["x"]))
            self.running += 1
            self.together = max(self.together, self.running)
        time.sleep(self.seconds)
        with self._lock:
            self.running -= 1
        if (inputs["x"] < 0).any():
            raise RuntimeError("negative")
        return [inputs["x"] * 2 for _ in outputs]


def test_rows_are_divided_between_the_cores_and_joined_in_their_order() -> None:
    whole, single = Session(), Session(0.05)
    x = np.arange(10.0).reshape(5, 2)
    (result,) = SideBySide(whole, single, 3).run(["y"], {"x": x})
    np.testing.assert_array_equal(result, x * 2)
    assert sorted(single.rows) == [1, 2, 2]
    assert single.together == 3
    assert whole.rows == []


@pytest.mark.parametrize("bad", [0, 4])
def test_a_failing_share_fails_the_call_once_the_others_have_ended(bad: int) -> None:
    single = Session(0.05)
    x = np.ones((5, 2))
    x[bad] = -1
    with pytest.raises(RuntimeError, match="negative"):
        SideBySide(Session(), single, 3).run(["y"], {"x": x})
    assert single.running == 0
    assert len(single.rows) == 3


@pytest.mark.parametrize("faster", ["whole", "single"])
def test_one_row_runs_in_the_faster_session_and_the_other_is_tried_again(faster: str) -> None:
    whole, single = Session(0.0 if faster == "whole" else 0.003), Session(0.0 if faster == "single" else 0.003)
    side = SideBySide(whole, single, 2)
    for _ in range(2 * AGAIN + 1):
        side.run(["y"], {"x": np.ones((1, 2))})
    slow = single if faster == "whole" else whole
    assert TRIALS < len(slow.rows) <= TRIALS + 3


@pytest.mark.parametrize("scheme", ["fp32", "int8"])
def test_rows_side_by_side_are_the_bits_of_one_call(
    scheme: str, sample_artifact: Path, quantized_of: Callable[[str], Path]
) -> None:
    folder = quantized_of("int8") if scheme == "int8" else sample_artifact
    graph = folder / "transformer" / "model.onnx"
    engine = OrtEngine(graph, read_manifest(folder).part("transformer").ports, threads=2)
    plain = open_session(graph, session_options(2), CPU)
    for rows in (1, 2, 3, 5):
        given = feeds(plain, rows)
        for _ in range(3 if rows == 1 else 1):  # a single row in either session
            for ours, theirs in zip(engine.run(given).values(), plain.run(None, given), strict=True):
                np.testing.assert_array_equal(ours, theirs)
