"""Compute what an adapter adds to one weight, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from export.values import Float32, read_all, read_rows
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
class Hadamard:
    """The element-wise product of two low-rank products, each given as `(up, down)` (LoHa)."""

    first: tuple[StoredTensor, StoredTensor]
    second: tuple[StoredTensor, StoredTensor]

    @property
    def shape(self) -> tuple[int, int]:
        return self.first[0].shape[0], self.first[1].shape[1]

    def load(self) -> RowsOf:
        """Read the factors and return a function that computes rows of the product."""
        (up, down), (other_up, other_down) = map(_both, (self.first, self.second))
        return lambda begin, end: (up[begin:end] @ down) * (other_up[begin:end] @ other_down)


@dataclass(frozen=True)
class Full:
    """A full difference: a matrix, or a vector of one value per row."""

    difference: StoredTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.difference.shape

    def load(self) -> RowsOf:
        """Return a function that reads rows of the difference."""
        return lambda begin, end: read_rows(self.difference, begin, end)


Factors = LowRank | Kronecker | Hadamard | Full


@dataclass(frozen=True)
class Term:
    """The contribution of one adapter to one weight: `scale` times rows of a product.

    Row 0 of the weight is row `offset` of the product. Rows of the weight outside the product do not change: the
    product may be one part of a fused matrix, and the weight another one.
    """

    factors: Factors
    scale: float  # the user's weight x alpha / rank
    file: Path
    offset: int = 0
    swapped: bool = False  # the halves of the rows are exchanged

    def load(self, height: int) -> RowsOf:
        """Return a function that computes rows of this term, for a weight of `height` rows.

        If the halves are swapped, a range of rows must not cross the middle.
        """
        product = self.factors.load()
        half = height // 2 if self.swapped else 0
        total, *columns = self.factors.shape

        def rows(begin: int, end: int) -> Float32:
            start = self.offset + (begin + half) % height
            stop = start + end - begin
            first, last = max(start, 0), min(stop, total)
            values = np.zeros((end - begin, *columns), np.float32)
            if first < last:
                values[first - start : last - start] = product(first, last)
            return np.float32(self.scale) * values

        return rows


def _product(factors: tuple[StoredTensor, ...]) -> Float32:
    matrices = [read_all(factor) for factor in factors]
    return matrices[0] if len(matrices) == 1 else matrices[0] @ matrices[1]


def _both(factors: tuple[StoredTensor, StoredTensor]) -> tuple[Float32, Float32]:
    return read_all(factors[0]), read_all(factors[1])
