"""What requests bring to the denoiser before they start: prompt embeddings, latents of images, masks; by ticket.

The front model first asks which of them the store has, then brings the others one by one. What was found is held for
the request from then on, so that it cannot be evicted before the request starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from kit.engine import Array
from kit.errors import EngineError
from pipeline.denoise import Denoiser
from pipeline.inpainting import Inpainting
from pipeline.live_request import LiveRequest
from pipeline.references import pack
from pipeline.request import Request
from pipeline.store import Store, Value, kind_of
from serve.wire import LATENTS, MASK, MASK_KEY

SHARED = ("prompt", "latents")  # kinds that are kept for other requests; keys and values the denoiser itself puts there


class Intake:
    """Items of requests that have not started, by ticket and key; used by one thread."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._items: dict[int, dict[str, Value]] = {}

    def find(self, ticket: int, keys: Sequence[str], again: bool = False) -> list[bool]:
        """Return for each key whether its item has to be brought.

        References whose keys and values are there need no latents. `again` is for keys that were looked up before.
        """
        held = self._items.setdefault(ticket, {})
        for key in sorted(keys, key=lambda key: kind_of(key) != "keys_values"):
            if key in held or (kind_of(key) == "latents" and _has_memory(held)):
                continue
            found = self.store.get(key, again)
            if found is not None:
                held[key] = found
        return [key not in held and not (kind_of(key) == "latents" and _has_memory(held)) for key in keys]

    def bring(self, ticket: int, key: str, name: str, array: Array) -> None:
        """Hold a copy of an item for a request, and keep it for others."""
        value = {name: np.array(array)}
        if kind_of(key) in SHARED:
            self.store.put(key, value)
        self._items.setdefault(ticket, {})[key] = value

    def take(self, ticket: int, keys: Sequence[str]) -> Mapping[str, Value]:
        """Return the items of a request, which now starts; raises EngineError if one is missing."""
        held = self._items.pop(ticket, {})
        needless = {"keys_values", "latents"} if _has_memory(held) else {"keys_values"}
        for key in keys:
            if key not in held and kind_of(key) not in needless:
                raise EngineError(f"an item of kind {kind_of(key)} is missing: the process ended unexpectedly")
        return held

    def sweep(self, is_open: Callable[[int], bool]) -> None:
        """Drop the items of requests that ended before they started."""
        for ticket in [ticket for ticket in self._items if not is_open(ticket)]:
            del self._items[ticket]


def _has_memory(held: Mapping[str, Value]) -> bool:
    return any(kind_of(key) == "keys_values" for key in held)


def admit(denoiser: Denoiser, request: Request, keys: Sequence[str], items: Mapping[str, Value]) -> LiveRequest:
    """Start a request with its items: prompts, the negative one last, then references in order; raises RequestError."""
    prompts = [items[key]["prompt_embeds"] for key in keys if kind_of(key) == "prompt"]
    memory_key = next((key for key in keys if kind_of(key) == "keys_values"), "")
    images = [items[key][LATENTS] for key in keys if kind_of(key) == "latents" and key in items]
    references, inpainting = None, None
    if images and memory_key not in items:
        encoded = [np.asarray(image, np.float32) for image in images]
        references = pack(encoded)
        if MASK_KEY in items:
            mask = np.asarray(items[MASK_KEY][MASK], np.float32)[:, None]
            inpainting = Inpainting(pack(encoded[:1]).latents, mask, denoiser.compute)
    negative = prompts[1] if len(prompts) > 1 else None
    return denoiser.admit(
        request, prompts[0], negative, references, inpainting, items.get(memory_key), memory_key=memory_key
    )
