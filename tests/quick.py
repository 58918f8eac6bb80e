"""A pytest plug-in for the developer's loop: `pytest -p tests.quick` leaves out what needs more than a moment.

That is: tests that start a server or need a GPU, tests behind a fixture that exports a whole checkpoint, and the files
named below, which export, compile or train in the test itself. `make test` runs them all.
"""

from __future__ import annotations

from pathlib import Path

import pytest

HEAVY_FIXTURES = {"artifact_of", "sample_artifact", "deployment_of", "server", "sample_record", "quantized_of"}
HEAVY_MARKS = ("server", "gpu")
HEAVY_FILES: set[str] = set()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the heavy ones."""
    heavy = [item for item in items if is_heavy(item)]
    config.hook.pytest_deselected(items=heavy)
    items[:] = [item for item in items if item not in heavy]


def is_heavy(item: pytest.Item) -> bool:
    """Say whether a test is left out."""
    return (
        any(item.get_closest_marker(mark) for mark in HEAVY_MARKS)
        or not HEAVY_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))
        or Path(item.path).relative_to(item.config.rootpath / "tests").as_posix() in HEAVY_FILES
    )
