"""Split and join axes with plain reshapes, whose target shapes are shared by all blocks of a graph.

torch's own flatten and unflatten read the shape of every tensor again, which costs several nodes each time.
"""

from __future__ import annotations

from torch import Tensor


def split_axis(x: Tensor, axis: int, *sizes: int) -> Tensor:
    """Replace one axis by several; one of the sizes may be -1."""
    axis %= x.ndim
    return x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :])


def join_axes(x: Tensor, first: int, last: int) -> Tensor:
    """Replace the axes from first to last, inclusive, by one."""
    first, last = first % x.ndim, last % x.ndim
    joined = 1
    for size in x.shape[first : last + 1]:
        joined *= size
    return x.reshape(*x.shape[:first], joined, *x.shape[last + 1 :])
