"""The front model without Triton: admission, cancellation, faults, deadlines; callers that the test controls."""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.errors import CancelledError, EngineError, RequestError, UnavailableError
from pipeline.images import encode
from pipeline.request import Limits, Request
from serve.front import Front
from serve.incoming import Options
from serve.ledger import Ledger, State
from serve.settings import Settings, Tuning
from tests.pipeline.test_denoise import small

SECONDS = 20.0
FIELDS = {"prompt": b"a cat", "steps": 2, "width": 64, "height": 64}


class Counts:
    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        self.values[f"{name} {label}".strip()] += int(amount)

    def set(self, name: str, value: float) -> None:
        self.values[name] = int(value)

    def observe(self, name: str, value: float) -> None:
        self.values[name] += 1


class Client:
    """A request whose stages the test controls."""

    def __init__(self, ledger: Ledger, start: Callable[[], None] = lambda: None, denoise: bool = True) -> None:
        self.ledger, self.on_start, self.denoise = ledger, start, denoise
        self.left = False
        self.stages: list[str] = []
        self.started = threading.Event()
        self.answer: Any = None
        self.came = threading.Event()
        self.request: Request | None = None
        self.cache = False
        self.ticket = 0

    def stage(self, name: str, since: float = 0.0) -> AbstractContextManager[None]:
        self.stages.append(name)
        return nullcontext()

    def is_cancelled(self) -> bool:
        assert not self.came.is_set(), "Triton has freed this request"
        return self.left

    def start(self, request: Request, ticket: int, cache: bool) -> None:
        self.request, self.ticket, self.cache = request, ticket, cache
        self.started.set()
        self.on_start()
        if self.denoise:
            self.ledger.finish(ticket)

    def fetch(self, ticket: int) -> Any:
        return "latents"

    def finish(self, request: Request, latents: Any) -> Any:
        return f"image of {latents}"

    def succeed(self, outputs: Any) -> None:
        self._answer(outputs)

    def fail(self, error: Exception) -> None:
        self._answer(error)

    def _answer(self, answer: Any) -> None:
        assert not self.came.is_set(), "answered twice"
        self.answer = answer
        self.came.set()

    def result(self) -> Any:
        assert self.came.wait(SECONDS)
        return self.answer


class House:
    def __init__(self, folder: Path, **tuning: Any) -> None:
        self.ledger = Ledger(folder / "ledger")
        self.counts = Counts()
        variant = replace(small("klein-4b"))
        self.front = Front(Settings(variant, "fp32", Limits(), Tuning(**tuning)), self.ledger, self.counts)

    def send(self, options: Options | None = None, fields: Mapping[str, Any] = FIELDS, **how: Any) -> Client:
        client = Client(self.ledger, **how)
        self.front.receive(client, fields, options or Options())
        return client


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path, live_requests=2, queue_size=3)
    yield made
    made.front.close()
    assert made.ledger.occupied == 0


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for(event: threading.Event) -> None:
    assert event.wait(SECONDS)


def sent_without_cache(house: House) -> Client:
    client = house.send(Options.read(0, '{"cache": "skip"}'))
    client.result()
    return client


def test_a_request_passes_all_stages_with_a_fixed_seed(house: House) -> None:
    client = house.send()
    assert client.result() == "image of latents"
    assert client.request is not None
    assert isinstance(client.request.seed, int)
    assert client.cache
    assert not sent_without_cache(house).cache
    until(lambda: house.ledger.occupied == 0)
    assert house.counts.values["flux2_images_total"] == 2


def test_invalid_requests_are_answered_before_any_work(house: House) -> None:
    for fields, words in (
        ({"prompt": b""}, "prompt: '' is empty"),
        ({"prompt": b"x" * 2000}, "prompt: 2000 bytes; the limit is 1024"),
        ({"prompt": b"a", "negative_prompt": b"y" * 900}, r"negative_prompt: 'y{76}\.\.\. has no effect"),
        ({"prompt": b"a", "output_format": b"p" * 65}, "output_format: 65 bytes; the limit is 64"),
    ):
        client = house.send(fields=fields)
        assert isinstance(client.answer, RequestError)
        assert not client.started.is_set()
        with pytest.raises(RequestError, match=words):
            raise client.answer
    assert house.counts.values["flux2_rejections_total invalid"] == 4


def test_more_requests_than_the_bounds_are_rejected_at_once(house: House) -> None:
    hold = threading.Event()
    clients = [house.send(start=lambda: wait_for(hold)) for _ in range(9)]
    refused = [client for client in clients if isinstance(client.answer, UnavailableError)]
    assert len(refused) == 4
    hold.set()
    assert sum(client.result() == "image of latents" for client in clients) == 5


def test_a_waiting_request_whose_client_left_is_never_started(house: House) -> None:
    hold = threading.Event()
    busy = [house.send(start=lambda: wait_for(hold)) for _ in range(2)]
    waiting = house.send()
    waiting.left = True
    assert isinstance(waiting.result(), CancelledError)
    assert not waiting.started.is_set()
    hold.set()
    assert all(client.result() == "image of latents" for client in busy)


def test_a_live_request_whose_client_left_is_marked_and_frees_its_place(house: House) -> None:
    client = house.send(denoise=False)
    assert client.started.wait(SECONDS)
    client.left = True
    assert isinstance(client.result(), CancelledError)
    until(lambda: not house.front.admission.in_flight)
    assert not house.ledger.is_wanted(client.ticket)
    assert house.counts.values["flux2_cancellations_total"] == 1


def test_a_deadline_ends_a_request(house: House) -> None:
    client = house.send(Options(timeout=0.2), denoise=False)
    assert isinstance(client.result(), UnavailableError)
    assert str(client.answer) == "the request's time is over; it was given up"
    until(lambda: not house.front.admission.in_flight)


def test_a_request_in_the_denoiser_whose_process_died_says_so(house: House) -> None:
    client = house.send(denoise=False)
    assert client.started.wait(SECONDS)
    house.ledger.count_denoiser()
    assert isinstance(client.result(), UnavailableError)
    assert str(client.answer) == "a process of the server ended during this request; it is restarted, try again"


def test_a_stage_whose_process_died_is_run_once_more(house: House) -> None:
    faults = [EngineError("Stub process 'text_encoder_0_0' is not healthy.")]
    client = house.send(start=lambda: raise_first(faults))
    assert client.result() == "image of latents"
    faults = [EngineError("Stub process 'text_encoder_0_0' is not healthy.")] * 2
    client = house.send(start=lambda: raise_first(faults))
    assert isinstance(client.result(), UnavailableError)


def raise_first(faults: list[EngineError]) -> None:
    if faults:
        raise faults.pop()


def test_requests_wait_while_a_model_is_healed(house: House) -> None:
    house.ledger.state = State.HEALING
    client = house.send()
    time.sleep(0.2)
    assert not client.started.is_set()
    house.ledger.state = State.SERVING
    assert client.result() == "image of latents"


def test_a_request_that_is_denoised_while_the_front_closes_is_answered(house: House) -> None:
    client = house.send(denoise=False)
    until(client.started.is_set)
    until(lambda: bool(house.front._denoising))
    closing = threading.Thread(target=house.front.close)
    closing.start()
    time.sleep(0.1)
    house.ledger.finish(client.ticket)
    assert client.result() == "image of latents"
    closing.join(SECONDS)
    assert not closing.is_alive()


def test_a_draining_server_takes_nothing_new(house: House) -> None:
    house.ledger.state = State.DRAINING
    client = house.send()
    assert str(client.answer) == "the server is stopping; send the request to another one, or again later"


def test_a_request_that_ended_two_processes_is_rejected(house: House) -> None:
    client = house.send(denoise=False)
    assert client.started.wait(SECONDS)
    (digest,) = house.ledger.in_flight()
    house.ledger.count_denoiser()
    client.result()
    house.ledger.refuse(digest)
    again = house.send()
    assert isinstance(again.answer, RequestError)
    assert "has ended a process of the server twice" in str(again.answer)
    assert house.send(fields={**FIELDS, "prompt": b"a dog"}).result() == "image of latents"


def test_priorities_and_timeouts_come_from_the_request_s_parameters() -> None:
    assert Options.read(0, "") == Options()
    assert Options.read(1_500_000, '{"priority_class": "batch"}') == Options(1.5, True)
    with pytest.raises(RequestError, match="cache: 'empty' is not one of use, skip"):
        Options.read(0, '{"cache": "empty"}')
    with pytest.raises(RequestError, match="priority_class: 'urgent' is not one of interactive, batch"):
        Options.read(0, '{"priority_class": "urgent"}')


def picture(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return encode(pixels, "png")


def test_reference_images_count_in_bytes_and_in_costs(house: House) -> None:
    hold = threading.Event()
    image = picture(64, 128)
    plain = house.send(start=lambda: wait_for(hold))
    edit = house.send(fields={**FIELDS, "images": [image, image]}, start=lambda: wait_for(hold))
    until(lambda: len(house.front.admission.live) == 2)
    costs = {entry.payload.caller: (entry.cost, entry.bytes) for entry in house.front.admission.live}
    assert costs[plain] == (2 * 16, 5)
    assert costs[edit] == (2 * (16 + 2 * 32), 5 + 2 * len(image))
    hold.set()
    assert [client.result() for client in (plain, edit)] == ["image of latents"] * 2


def test_fields_of_requests_in_flight_have_a_bound_in_bytes(tmp_path: Path) -> None:
    image = picture(64, 64)
    made = House(tmp_path, live_requests=2, queue_size=8, queue_bytes=2 * len(image))
    hold = threading.Event()
    fields = {**FIELDS, "images": [image]}
    first, second = (made.send(fields=fields, start=lambda: wait_for(hold)) for _ in range(2))
    assert isinstance(second.answer, UnavailableError)
    assert re.match(
        rf"the requests in flight have \d+ bytes and this one has {5 + len(image)}, the limit is", str(second.answer)
    )
    small = made.send(start=lambda: wait_for(hold))
    hold.set()
    assert [client.result() for client in (first, small)] == ["image of latents"] * 2
    alone = made.send(fields={**FIELDS, "images": [image, image, image]})
    assert alone.result() == "image of latents", "a request that is alone is served whatever it has"
    made.front.close()


def test_requests_with_other_images_have_other_digests(house: House) -> None:
    hold = threading.Event()
    fields = [{**FIELDS, "images": [picture(64, 64, seed)]} for seed in range(2)]
    clients = [house.send(fields=sent, start=lambda: wait_for(hold)) for sent in fields]
    until(lambda: len(house.ledger.in_flight()) == 2)
    hold.set()
    assert [client.result() for client in clients] == ["image of latents"] * 2
