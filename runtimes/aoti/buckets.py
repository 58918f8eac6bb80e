"""Choose the compiled package for a call: compiled code has fixed shapes, so a part has one package per bucket.

Axes other than the batch must match exactly: padded image tokens are not masked, so padding would change the image.
Rows are independent, so a batch is padded to the next bucket, and a batch that is too large is split.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kit.ports import Ports, split_axis

BATCH = "batch"
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Call:
    """One run of a package: rows `start` to `stop` of the request, padded to the bucket's batch."""

    bucket: int  # its index in the list of buckets
    start: int
    stop: int


def sizes_of(ports: Ports, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """Return the sizes of the named axes, from the shapes of the inputs.

    Raises ValueError, which names the port, if a shape does not fit its port.
    """
    sizes: dict[str, int] = {}
    for port in ports.inputs:
        if port.name not in shapes:
            raise ValueError(f"input {port.name} is missing; the part takes {', '.join(p.name for p in ports.inputs)}")
        shape = shapes[port.name]
        if len(shape) == len(port.dims):
            for size, axis in zip(shape, port.dims, strict=True):
                if isinstance(axis, str):
                    factor, name = split_axis(axis)
                    sizes.setdefault(name, size // factor)
        if len(shape) != len(port.dims) or tuple(shape) != port.shape(sizes):
            wanted = ", ".join(str(axis) for axis in port.dims)
            raise ValueError(f"{port.name}: shape {list(shape)} is not [{wanted}] with {_text(sizes)}")
    return sizes


def calls(buckets: Sequence[Sizes], sizes: Sizes) -> Iterator[Call]:
    """Split a request into package runs.

    Raises LookupError, which lists the compiled sizes, if no bucket has the sizes of the request.
    """
    fits = sorted((b[BATCH], i) for i, b in enumerate(buckets) if _rest(b) == _rest(sizes))
    if not fits:
        there = sorted({_text(_rest(b)) for b in buckets})
        raise LookupError(
            f"no package was compiled for {_text(_rest(sizes))}; there are: {'; '.join(there)}. Compile the artifact "
            "with --sizes that include it"
        )
    start, rows = 0, sizes[BATCH]
    while start < rows:
        left = rows - start
        batch, index = next((fit for fit in fits if fit[0] >= left), fits[-1])
        stop = min(rows, start + batch)
        yield Call(index, start, stop)
        start = stop


def _rest(sizes: Sizes) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if name != BATCH}


def _text(sizes: Sizes) -> str:
    return ", ".join(f"{name} {size}" for name, size in sorted(sizes.items())) or "any size"
