"""One bounded memory of what requests share: latents of references, keys and values of them, and prompt embeddings.

Values are found by a key that says everything they were computed from (see pipeline/store_keys.py), so a value that is
found equals the one that would be computed, bit by bit. When the store is full, the values that were not used for
longest make room. A request holds the values that it uses, so they outlive their place in the store.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Literal

from kit.engine import Array

Event = Literal["hit", "miss", "eviction"]
Value = Mapping[str, Array]  # arrays by name


class Store:
    """Values by key, at most `limit` bytes of them; 0 keeps nothing. Thread-safe.

    `observe` is told of every event with the kind of its key, the part before the colon.
    """

    def __init__(self, limit: int, observe: Callable[[Event, str], None] = lambda event, kind: None) -> None:
        self.limit = limit
        self.bytes = 0
        self._observe = observe
        self._values: OrderedDict[str, Value] = OrderedDict()  # least recently used first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: str, again: bool = False) -> Value | None:
        """Return the value of a key, None if there is none; its arrays are read-only.

        Who looks `again` for what was missing does not count another miss.
        """
        with self._lock:
            value = self._values.get(key)
            if value is not None:
                self._values.move_to_end(key)
        if value is not None or not again:
            self._observe("miss" if value is None else "hit", kind_of(key))
        return value

    def put(self, key: str, value: Value) -> None:
        """Keep a value; its arrays become read-only. One that is larger than the whole store is not kept."""
        size = size_of(value)
        for array in value.values():
            array.flags.writeable = False
        evicted = []
        with self._lock:
            if key in self._values or size > self.limit:
                return
            while self.bytes + size > self.limit:
                oldest, old = self._values.popitem(last=False)
                self.bytes -= size_of(old)
                evicted.append(oldest)
            self._values[key] = value
            self.bytes += size
        for oldest in evicted:
            self._observe("eviction", kind_of(oldest))


def kind_of(key: str) -> str:
    return key.partition(":")[0]


def size_of(value: Value) -> int:
    """Return the bytes of a value's arrays."""
    return sum(array.nbytes for array in value.values())
