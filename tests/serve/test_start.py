"""Starting requests without Triton: what is brought, what is found, what is shared; engines that count their calls."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.errors import CancelledError, EngineError
from pipeline.denoise import Denoiser
from pipeline.images import encode
from pipeline.live_request import LiveRequest
from pipeline.request import Limits, Request, check
from pipeline.store import Store
from serve.flights import Flights
from serve.intake import Intake, admit
from serve.ledger import Ledger
from serve.settings import Settings, Tuning
from serve.start import Starter, items_of
from serve.wire import ACTION, DENOISED, DENOISER, KEYS, LATENTS, MASK, TICKET, request_from_tensors
from tests.pipeline.test_denoise import small
from tests.serve.test_step_loop import Cached, Extract, SmallMemory

KLEIN, BASE, KV = small("klein-4b"), small("klein-base-4b"), small("klein-9b-kv")


def image(number: int, width: int = 64, height: int = 64) -> bytes:
    return encode(np.full((height, width, 3), number, np.uint8), "png")


class Deployment:
    """The models that a front model calls, in this process: embeddings and latents are digests of what they are of."""

    def __init__(self, folder: Path, variant: Any, cache_bytes: int = 2**24) -> None:
        self.settings = Settings(variant, "fp32", Limits(), Tuning(cache_bytes=cache_bytes), checkpoint="one")
        self.ledger = Ledger(folder / "ledger")
        self.starter = Starter(self.settings, self.ledger)
        self.store = Store(cache_bytes)
        self.intake = Intake(self.store)
        self.extract = Extract()
        is_kv = variant is KV
        self.denoiser = Denoiser(
            variant,
            "fp32",
            SmallMemory(),
            extract=self.extract if is_kv else None,
            cached=Cached() if is_kv else None,
            store=self.store,
        )
        self.calls: list[str] = []
        self.started: dict[int, LiveRequest] = {}
        self.lock = threading.Lock()  # Triton calls a model from one thread
        self.hold = threading.Event()
        self.hold.set()

    def __call__(self, model: str, outputs: list[str], inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        self.calls.append(model)
        if model == "vae_encoder":
            assert self.hold.wait(20)
            number = float(np.frombuffer(inputs["image"].item()[-64:], np.uint8).sum())
            if outputs == ["mask"]:
                width, height = inputs["size"] // 16
                return {"mask": np.ones(width * height, np.float32)}
            return {"latents": np.full((128, 4, 4), number + (inputs["role"].item() == b"base"), np.float32)}
        if model == "prompt_stage":
            number = sum(inputs["text"].item())
            shape = (1, self.settings.variant.text_tokens, self.settings.variant.transformer.joint_dim)
            inputs = {**inputs, "prompt_embeds": np.full(shape, number, np.float32)}
        else:
            assert model == DENOISER
        with self.lock:
            return self._denoise(inputs)

    def _denoise(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        ticket, action = int(inputs[TICKET.name].item()), inputs[ACTION].item().decode()
        keys = [key.decode() for key in inputs[KEYS].reshape(-1)]
        if action.startswith("find"):
            return {"missing": np.array([self.intake.find(ticket, keys, action == "find again")], np.int32)}
        if action == "bring":
            (name,) = {"prompt_embeds", LATENTS, MASK} & set(inputs)
            self.intake.bring(ticket, keys[0], name, inputs[name][0])
        else:
            request = request_from_tensors({tensor.name: inputs[tensor.name] for tensor in DENOISED})
            self.started[ticket] = admit(self.denoiser, request, keys, self.intake.take(ticket, keys))
        return {"started": np.array([[ticket]])}

    def start(self, fields: Mapping[str, Any], cache: bool = True) -> LiveRequest:
        ticket = self.ledger.open(1)
        self.starter.start(self.request(fields), ticket, self, cache)
        self.ledger.close(ticket)
        return self.started.pop(ticket)

    def request(self, fields: Mapping[str, Any]) -> Request:
        return check({"prompt": "a cat", "seed": 1, "steps": 2, **fields}, self.settings.variant, self.settings.limits)

    def finish(self, live: LiveRequest) -> Any:
        while not live.done:
            self.denoiser.step([live])
        return live.image_latents()


@pytest.fixture
def klein(tmp_path: Path) -> Deployment:
    return Deployment(tmp_path, KLEIN)


def test_a_request_brings_its_prompt_and_images_and_the_second_one_nothing(klein: Deployment) -> None:
    fields = {"images": [image(1), image(2)]}
    first = klein.finish(klein.start(fields))
    assert klein.calls == [
        DENOISER, "vae_encoder", DENOISER, "vae_encoder", DENOISER, "prompt_stage", DENOISER,
    ]  # fmt: skip
    klein.calls.clear()
    assert np.array_equal(klein.finish(klein.start(fields)), first)
    assert klein.calls == [DENOISER, DENOISER]


def test_an_image_that_is_two_references_is_encoded_once(klein: Deployment) -> None:
    live = klein.start({"images": [image(1), image(1)]})
    assert klein.calls.count("vae_encoder") == 1
    assert live.references is not None
    assert len(live.references.ids) == 32


def test_a_repainted_image_is_not_the_reference_of_the_same_file(klein: Deployment) -> None:
    plain = klein.start({"images": [image(1)]})
    masked = klein.start({"images": [image(1)], "mask": image(255)})
    assert klein.calls.count("vae_encoder") == 3
    assert plain.references is not None
    assert masked.references is not None
    assert not np.array_equal(plain.references.latents, masked.references.latents)
    assert masked.inpainting is not None
    assert masked.inpainting.mask.shape == (16, 1)


def test_the_negative_prompt_is_shared_by_requests_with_other_prompts(tmp_path: Path) -> None:
    base = Deployment(tmp_path, BASE)
    one, other = base.start({"prompt": "a cat"}), base.start({"prompt": "a dog"})
    assert base.calls.count("prompt_stage") == 3
    assert one.negative_embeds is not None
    assert not np.array_equal(one.prompt_embeds, one.negative_embeds)
    assert not np.array_equal(one.prompt_embeds, other.prompt_embeds)


@pytest.mark.parametrize("cache_bytes", [0, 2**24])
def test_without_the_cache_everything_is_computed_anew(cache_bytes: int, tmp_path: Path) -> None:
    made = Deployment(tmp_path, KV, cache_bytes)
    for _ in range(2):
        made.finish(made.start({"images": [image(1)]}, cache=False))
    assert (made.calls.count("vae_encoder"), made.calls.count("prompt_stage"), made.extract.calls) == (2, 2, 2)


def test_over_many_requests_with_half_the_size_nothing_is_mixed_up_and_nothing_leaks(tmp_path: Path) -> None:
    """Ten references of one size in sets of one or two, in a store that has room for about half of what they need."""
    plain = Deployment(tmp_path, KV, 0)
    sets = [(a, b) if b >= 0 else (a,) for a in range(10) for b in (-1, (a + 1) % 10)]
    expected = {chosen: plain.finish(plain.start({"images": [image(n) for n in chosen]})) for chosen in sets}
    assert len({latents.tobytes() for latents in expected.values()}) == len(sets)
    whole = Deployment(tmp_path, KV)
    for chosen in sets:
        whole.finish(whole.start({"images": [image(n) for n in chosen]}))
    half = Deployment(tmp_path, KV, whole.store.bytes // 2)
    chance = random.Random(3)
    for _ in range(500):
        chosen = chance.choice(sets)
        assert np.array_equal(half.finish(half.start({"images": [image(n) for n in chosen]})), expected[chosen])
        assert half.store.bytes <= half.store.limit
    assert 20 < half.extract.calls < 500
    assert not half.intake._items
    assert half.ledger.occupied == 0


def test_what_was_found_is_held_until_the_request_starts(klein: Deployment) -> None:
    intake, store = Intake(Store(800)), klein.store
    intake.store.put("latents:a", {LATENTS: np.ones(200, np.float32)})
    assert intake.find(1, ["latents:a"]) == [False]
    intake.store.put("latents:b", {LATENTS: np.zeros(200, np.float32)})
    assert intake.store.get("latents:a") is None
    assert intake.take(1, ["latents:a"])["latents:a"][LATENTS].sum() == 200
    assert store.bytes == 0


def test_items_of_requests_that_ended_before_they_started_are_dropped(klein: Deployment) -> None:
    klein.intake.bring(1, "latents:a", LATENTS, np.ones(4, np.float32))
    klein.intake.sweep(lambda ticket: False)
    with pytest.raises(EngineError, match="an item of kind latents is missing: the process ended unexpectedly"):
        klein.intake.take(1, ["latents:a"])


def test_keys_and_values_make_latents_needless() -> None:
    intake = Intake(Store(2**20))
    keys = ["keys_values:k", "prompt:p", "latents:a", "latents:b"]
    assert intake.find(1, keys) == [True, True, True, True]
    intake.store.put("keys_values:k", {"ref_key_0": np.ones(4, np.float32)})
    assert intake.find(2, keys) == [False, True, False, False]
    with pytest.raises(EngineError, match="an item of kind prompt is missing: the process ended unexpectedly"):
        intake.take(2, keys)


def test_requests_that_need_the_same_image_at_once_encode_it_once(klein: Deployment) -> None:
    klein.hold.clear()
    with ThreadPoolExecutor(4) as pool:
        starts = [pool.submit(klein.start, {"images": [image(1)], "prompt": f"a {n}"}) for n in range(4)]
        while klein.calls.count(DENOISER) < 4:
            pass
        klein.hold.set()
        lives = [start.result() for start in starts]
    assert klein.calls.count("vae_encoder") == 1
    assert all(live.references is not None for live in lives)


def test_a_cancelled_request_encodes_no_further_image(klein: Deployment) -> None:
    klein.hold.clear()
    ticket = klein.ledger.open(1)
    with ThreadPoolExecutor(1) as pool:
        request = klein.request({"images": [image(1), image(2)]})
        start = pool.submit(klein.starter.start, request, ticket, klein)
        while "vae_encoder" not in klein.calls:
            pass
        klein.ledger.cancel(ticket)
        klein.hold.set()
        with pytest.raises(CancelledError, match="the request was given up"):
            start.result()
    assert klein.calls.count("vae_encoder") == 1
    assert not klein.started


def test_who_waits_for_another_request_s_work_can_be_cancelled() -> None:
    flights, waiting = Flights(), threading.Event()

    def wanted() -> Iterator[bool]:
        yield True
        waiting.set()
        yield False

    answers = wanted()
    with (
        flights.alone({"a", "b"}, lambda: True),
        pytest.raises(CancelledError),
        flights.alone({"b", "c"}, lambda: next(answers)),
    ):
        pass
    assert waiting.is_set()
    with flights.alone({"a", "b", "c"}, lambda: True) as waited:
        assert not waited


def test_the_keys_of_a_request_name_its_checkpoint(klein: Deployment) -> None:
    request = klein.request({"images": [image(1)]})
    other = Settings(KLEIN, "fp32", Limits(), Tuning(), checkpoint="two")
    assert not set(items_of(request, klein.settings).keys) & set(items_of(request, other).keys)
