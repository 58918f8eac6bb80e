"""Compute what an adapter adds to one weight, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.values import Float32, read_all
from kit.safetensors_file import StoredTensor

RowsOf = Callable[[int, int], Float32]


@dataclass(frozen=True)
class LowRank:
    """B A: `up` [rows, rank] times `down` [rank, columns]."""

    down: StoredTensor
    up: StoredTensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def load(self) -> RowsOf:
        """Read both factors and return a function that computes rows of the product."""
        down, up = read_all(self.down), read_all(self.up)
        return lambda begin, end: up[begin:end] @ down


@dataclass(frozen=True)
class Kronecker:
    """The Kronecker product of two matrices, each stored whole or as a product of two (`[A, B]` is A B)."""

    left: tuple[StoredTensor, ...]
    right: tuple[StoredTensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return (
            self.left[0].shape[0] * self.right[0].shape[0],
            self.left[-1].shape[1] * self.right[-1].shape[1],
        )

    def load(self) -> RowsOf:
        """Read the factors and return a function that computes rows of the product."""
        left, right = _product(self.left), _product(self.right)
        height = right.shape[0]

        def rows(begin: int, end: int) -> Float32:
            index = np.arange(begin, end)
            pairs = left[index // height][:, :, None] * right[index % height][:, None, :]  # [rows, left, right]
            product: Float32 = pairs.reshape(end - begin, -1)
            return product

        return rows


@dataclass(frozen=True)
class Term:
    """The contribution of one adapter to one weight: `scale` times the rows of the product from `offset` on."""

    factors: LowRank | Kronecker
    scale: float  # the user's weight x alpha / rank
    file: Path
    offset: int = 0  # the first row of the weight in a fused product
    swapped: bool = False  # the halves of the rows are exchanged

    def load(self, height: int) -> RowsOf:
        """Return a function that computes rows of this term, for a weight of `height` rows.

        If the halves are swapped, a range of rows must not cross the middle.
        """
        product = self.factors.load()
        half = height // 2 if self.swapped else 0

        def rows(begin: int, end: int) -> Float32:
            start = self.offset + (begin + half) % height
            return np.float32(self.scale) * product(start, start + end - begin)

        return rows


def _product(factors: tuple[StoredTensor, ...]) -> Float32:
    matrices = [read_all(factor) for factor in factors]
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]
