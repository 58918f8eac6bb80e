"""What every engine must do with its inputs and outputs, as kit.engine states it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from kit.engine import Array, Engine


def assert_conforms(engine: Engine, make: Callable[[int], dict[str, Array]]) -> None:
    """Run an engine on inputs of one shape; `make` gives other values for another seed."""
    given, other = make(1), make(2)
    kept = _copies(given)
    first = engine.run(given)
    assert _same(given, kept), "the engine changed its inputs"
    result = _copies(first)

    for array in given.values():
        array.flags.writeable = False
    for _ in range(3):
        assert _same(engine.run(given), result), "the same read-only arrays gave another result"

    changed = engine.run(other)
    assert not _same(changed, result), "new arrays were not read"
    assert _same(first, result), "an output changed when the engine ran again"
    assert _same(engine.run(given), result), "read-only arrays were not read again after others"

    for name, array in other.items():  # writeable, so it may change between calls
        array[...] = kept[name]
    assert _same(engine.run(other), result), "a writeable array that changed was not read again"


def _copies(arrays: dict[str, Array]) -> dict[str, Array]:
    return {name: array.copy() for name, array in arrays.items()}


def _same(found: dict[str, Array], wanted: dict[str, Array]) -> bool:
    assert set(found) == set(wanted)
    return all(
        found[name].dtype == array.dtype and np.array_equal(found[name].view(np.uint8), array.view(np.uint8))
        for name, array in wanted.items()
    )
