"""A request as it arrives: what a client may say besides its fields, the bytes of these, and a digest of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kit.errors import RequestError

PRIORITIES = ("interactive", "batch")
CACHES = ("use", "skip")


@dataclass(frozen=True)
class Options:
    """What a client may say of a request besides its fields: Triton's timeout and parameters."""

    timeout: float | None = None  # seconds
    batch: bool = False
    tag: int = 0
    trace_context: str = ""  # of the caller's span, as JSON
    cache: bool = True  # whether what other requests computed may be used

    @classmethod
    def read(cls, microseconds: int, parameters: str) -> Options:
        """Read them as the python backend gives them; raises RequestError for an unknown priority or cache."""
        values = json.loads(parameters) if parameters else {}
        priority = values.get("priority_class", PRIORITIES[0])
        if priority not in PRIORITIES:
            raise RequestError(f"priority_class: {str(priority)[:40]!r} is not one of {', '.join(PRIORITIES)}")
        cache = values.get("cache", CACHES[0])
        if cache not in CACHES:
            raise RequestError(f"cache: {str(cache)[:40]!r} is not one of {', '.join(CACHES)}")
        timeout = microseconds / 1e6 if microseconds > 0 else None
        context = str(values.get("flux2_trace_context", ""))
        return cls(timeout, priority == "batch", int(values.get("flux2_tag", 0)), context, cache == CACHES[0])


def bytes_of(fields: Mapping[str, Any]) -> int:
    """Return the bytes of the texts and encoded images among the fields."""
    items = [item for value in fields.values() for item in (value if isinstance(value, list) else [value])]
    return sum(len(item) for item in items if isinstance(item, (bytes, str)))


def digest(fields: Mapping[str, Any]) -> int:
    """Return 63 bits that identify a request's fields as they were sent."""
    known = sorted((name, value) for name, value in fields.items() if value is not None)
    found = hashlib.sha256()
    for name, value in known:
        for item in [name, *(value if isinstance(value, list) else [value])]:
            found.update(hashlib.sha256(item if isinstance(item, bytes) else repr(item).encode()).digest())
    return int.from_bytes(found.digest()[:8], "big") >> 1 or 1
