"""Position ids of tokens: four numbers (t, h, w, l) that the transformer's rotary embedding reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
REFERENCE_TIME = 10  # between the time coordinates of two references, and before the first


def image_ids(rows: int, columns: int, time: int = 0) -> Int64:
    """Position ids (t, h, w, l) of an image's tokens, [rows * columns, 4]."""
    ids = np.zeros((rows, columns, 4), np.int64)
    ids[..., 0] = time
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)
    return ids.reshape(-1, 4)


def reference_ids(grids: Sequence[tuple[int, int]]) -> Int64:
    """Position ids of the tokens of references with (rows, columns), [R, 4]: each has a time of its own."""
    return np.concatenate([image_ids(*grid, REFERENCE_TIME * (i + 1)) for i, grid in enumerate(grids)])


def text_ids(tokens: int) -> Int64:
    """Position ids of text tokens, [tokens, 4]: only the last axis is used."""
    ids = np.zeros((tokens, 4), np.int64)
    ids[:, 3] = np.arange(tokens)
    return ids
