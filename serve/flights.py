"""Work that several requests need at the same time is done by one of them, while the others wait."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from kit.errors import CancelledError

POLL_SECONDS = 0.05  # between two looks at whether a waiting request is still wanted


class Flights:
    """A lock per key that is in use; thread-safe."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._changed = threading.Condition()

    @contextmanager
    def alone(self, keys: Iterable[str], wanted: Callable[[], bool]) -> Iterator[bool]:
        """Be the only one that works on any of these keys; yields whether others had to be waited for.

        Raises CancelledError if the request is given up meanwhile.
        """
        mine, waited = set(keys), False
        with self._changed:
            while self._taken & mine:
                waited = True
                self._changed.wait(POLL_SECONDS)
                if not wanted():
                    raise CancelledError("the request was given up")
            self._taken |= mine
        try:
            yield waited
        finally:
            with self._changed:
                self._taken -= mine
                self._changed.notify_all()
