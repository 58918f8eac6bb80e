"""The store of what requests share: bounds, order of eviction, threads, and keys that are never mixed up."""

from __future__ import annotations

import random
import threading
from collections import Counter

import numpy as np
import pytest

from pipeline.store import Event, Store, Value, kind_of
from pipeline.store_keys import image_key, memory_key, prompt_key


def value(number: int, bytes_: int = 400) -> Value:
    return {"latents": np.full(bytes_ // 4, number, np.float32)}


def number_of(found: Value | None) -> float | None:
    return None if found is None else float(np.asarray(found["latents"], np.float32).flat[0])


def test_what_was_not_used_for_longest_makes_room() -> None:
    events: list[tuple[Event, str]] = []
    store = Store(800, lambda event, kind: events.append((event, kind)))
    store.put("latents:a", value(1))
    store.put("latents:b", value(2))
    assert number_of(store.get("latents:a")) == 1
    store.put("prompt:c", value(3))
    assert [number_of(store.get(key)) for key in ("latents:a", "latents:b", "prompt:c")] == [1, None, 3]
    assert (store.bytes, len(store)) == (800, 2)
    assert events == [
        ("hit", "latents"), ("eviction", "latents"), ("hit", "latents"), ("miss", "latents"), ("hit", "prompt"),
    ]  # fmt: skip


def test_a_value_larger_than_the_store_is_not_kept_and_evicts_nothing() -> None:
    store = Store(800)
    store.put("latents:a", value(1))
    store.put("latents:b", value(2, 804))
    assert number_of(store.get("latents:a")) == 1
    assert store.get("latents:b") is None
    nothing = Store(0)
    nothing.put("latents:a", value(1))
    assert nothing.get("latents:a") is None


def test_values_cannot_be_changed_by_who_uses_them() -> None:
    store = Store(800)
    store.put("latents:a", value(1))
    found = store.get("latents:a")
    assert found is not None
    with pytest.raises(ValueError, match="read-only"):
        found["latents"][0] = 5


def test_a_store_of_half_the_size_never_exceeds_it_and_never_mixes_over_many_requests() -> None:
    counts: Counter[str] = Counter()
    store = Store(10 * 400, lambda event, kind: counts.update([event]))
    chance = random.Random(1)
    for _ in range(2000):
        wanted = chance.randrange(20)
        found = store.get(f"latents:{wanted}")
        if found is None:
            store.put(f"latents:{wanted}", value(wanted))
        else:
            assert number_of(found) == wanted
        assert store.bytes == 400 * len(store) <= store.limit
    assert counts["hit"] + counts["miss"] == 2000
    assert counts["miss"] - counts["eviction"] == len(store)


def test_threads_share_a_store() -> None:
    store, wrong = Store(8 * 400), []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(2000):
            wanted = chance.randrange(16)
            found = store.get(f"latents:{wanted}")
            if found is None:
                store.put(f"latents:{wanted}", value(wanted))
            elif number_of(found) != wanted:
                wrong.append(wanted)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.bytes == 400 * len(store) <= store.limit


def test_keys_differ_by_everything_that_a_value_depends_on() -> None:
    keys = [
        prompt_key("one", "a cat"),
        prompt_key("one", "a dog"),
        prompt_key("two", "a cat"),
        image_key("one", b"a cat", (64, 64), "reference"),
        image_key("one", b"a cat", (64, 64), "base"),
        image_key("one", b"a cat", (64, 80), "reference"),
        image_key("one", b"a dog", (64, 64), "reference"),
        image_key("two", b"a cat", (64, 64), "reference"),
        memory_key("one", ["latents:1", "latents:2"]),
        memory_key("one", ["latents:2", "latents:1"]),
        memory_key("one", ["latents:1"]),
        memory_key("one", ["latents:1latents:2"]),
        memory_key("two", ["latents:1", "latents:2"]),
    ]
    assert len(set(keys)) == len(keys)
    assert {kind_of(key) for key in keys} == {"prompt", "latents", "keys_values"}
    assert prompt_key("one", "a cat") == keys[0]
