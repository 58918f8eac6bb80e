"""Send requests to a server in three ways: one after the other, in a closed loop of clients, or as a Poisson stream.

A Poisson stream is an open loop: requests are sent when they are due, whether or not earlier ones were answered, and
their seconds count from when they were due, so that a sender that falls behind does not hide what clients would wait.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpc

from kit.errors import Flux2Error
from serve.client import Client, fields_to_inputs
from serve.wire import FRONT

GIVE_UP_SECONDS = 120.0  # that a load waits for its last answers


@dataclass(frozen=True)
class Outcome:
    """One request: its number, when it was due, its seconds, and its image or error."""

    sent: float  # seconds of time.perf_counter
    seconds: float
    image: bytes | None
    error: str = ""
    number: int = 0
    late: float = 0.0  # seconds after it was due when it was really sent

    @property
    def sort(self) -> str:
        """Return the error without its numbers, so that errors of one sort can be counted."""
        return re.sub(r"\d[\d.]*", "N", self.error)[:80]


def send(client: Client, fields: Mapping[str, Any], timeout: float = GIVE_UP_SECONDS, number: int = 0) -> Outcome:
    """Send one request and wait for it."""
    start = time.perf_counter()
    try:
        images = client.generate(fields, timeout=timeout).images
    except Flux2Error as error:
        return Outcome(start, time.perf_counter() - start, None, str(error), number)
    return Outcome(start, time.perf_counter() - start, images[0], number=number)


def percentile(values: Sequence[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 4) if values else None


def poisson_times(rate: float, seconds: float, seed: int = 1) -> list[float]:
    """Return when requests are due, in seconds from the start: one at least, however short the stream is."""
    chance = random.Random(seed)
    at = chance.expovariate(rate)
    due = [min(at, seconds)]
    while (at := at + chance.expovariate(rate)) < seconds:
        due.append(at)
    return due


def open_loop(
    url: str, due: Sequence[float], request: Callable[[int], Mapping[str, Any]], watch: Callable[[], Any] = lambda: None
) -> tuple[list[Outcome], list[Any]]:
    """Send request(n) at due[n]; returns the outcomes in order of arrival, and what `watch` returned after each."""
    done: dict[int, Outcome] = {}
    seen: list[Any] = []
    with grpc.InferenceServerClient(url) as stub:
        start = time.perf_counter()
        for number, at in enumerate(due):
            if (wait := start + at - time.perf_counter()) > 0:
                time.sleep(wait)

            late = time.perf_counter() - start - at

            def collect(
                result: Any, error: Any, number: int = number, due: float = start + at, late: float = late
            ) -> None:
                image = None if error is not None else bytes(result.as_numpy("image")[0])
                text = "" if error is None else f"{str(error.status()).removeprefix('StatusCode.')}: {error.message()}"
                done[number] = Outcome(due, time.perf_counter() - due, image, text, number, late)

            stub.async_infer(FRONT, fields_to_inputs(request(number)), callback=collect)
            seen.append(watch())
        deadline = time.perf_counter() + GIVE_UP_SECONDS
        while len(done) < len(due) and time.perf_counter() < deadline:
            time.sleep(0.01)
    lost = {n: Outcome(start + at, GIVE_UP_SECONDS, None, "no answer", n) for n, at in enumerate(due) if n not in done}
    return [outcome for _, outcome in sorted({**done, **lost}.items())], seen


def closed_loop(
    client: Client,
    clients: int,
    seconds: float,
    request: Callable[[int], Mapping[str, Any]],
    think: float = 0.0,
    seed: int = 1,
    count: int = 1 << 30,
) -> list[Outcome]:
    """Let so many clients send one request after the other, each after thinking for `think` seconds on average.

    The times to think are exponentially distributed; the first client begins at once. No request begins after
    `seconds`, or after `count` of them.
    """
    numbers = iter(range(count))
    lock = threading.Lock()
    end = time.perf_counter() + seconds

    def run(index: int) -> Iterator[Outcome]:
        chance = random.Random(1000 * seed + index)
        is_first = index == 0
        while True:
            if think and not is_first:
                time.sleep(chance.expovariate(1 / think))
            is_first = False
            if time.perf_counter() >= end:
                return
            with lock:
                number = next(numbers, -1)
            if number < 0:
                return
            yield send(client, request(number), number=number)

    with ThreadPoolExecutor(clients) as pool:
        found = [outcome for outcomes in pool.map(lambda i: list(run(i)), range(clients)) for outcome in outcomes]
    return sorted(found, key=lambda outcome: outcome.number)


def rate(outcomes: Sequence[Outcome]) -> float:
    """Return the answered requests per second, from the first one that was sent to the last answer."""
    answered = [o for o in outcomes if o.image is not None]
    if not answered:
        return 0.0
    return len(answered) / (max(o.sent + o.seconds for o in answered) - min(o.sent for o in outcomes))
