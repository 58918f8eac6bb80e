"""The client: what it sends, and which error each failure becomes."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from kit.errors import Flux2Error, RequestError, ServerError, UnavailableError
from serve.client import Client, fields_to_inputs
from serve.launch import Server
from serve.tcp_ports import TcpPorts


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "widht": 64}, "unknown field 'widht'; there are: prompt"),
        ({"prompt": "a", "width": "wide"}, "width: 'wide' is not a INT32 value"),
        ({"prompt": "a", "images": b"one"}, "images: expected a list of encoded images, each as bytes"),
        ({"prompt": "a", "images": ["a.png"]}, "images: expected encoded images as bytes, such as those of Path"),
        ({"prompt": "a", "mask": "m.png"}, "mask: expected encoded images as bytes, such as those of Path.read_bytes"),
        ({"prompt": "a", "width": 2**40}, "width: 1099511627776 is not a INT32 value"),
    ],
)
def test_a_value_that_cannot_be_sent_is_rejected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        fields_to_inputs(fields)


def test_fields_that_are_none_are_omitted() -> None:
    assert [tensor.name() for tensor in fields_to_inputs({"prompt": "a", "seed": None, "steps": 3})] == [
        "prompt",
        "steps",
    ]


def test_images_are_a_list_and_none_of_them_is_no_field() -> None:
    fields = {"prompt": "a", "images": [b"one", b"two"], "mask": b"mask", "strength": 0.5}
    sent = {tensor.name(): (tensor.shape(), tensor.datatype()) for tensor in fields_to_inputs(fields)}
    assert sent["images"] == ([2], "BYTES")
    assert (sent["mask"], sent["strength"]) == (([1], "BYTES"), ([1], "FP32"))
    assert [tensor.name() for tensor in fields_to_inputs({"prompt": "a", "images": []})] == ["prompt"]


@pytest.mark.server
def test_a_request_that_exceeds_its_timeout_is_cancelled(server: Server) -> None:
    with (
        Client(server.url) as client,
        pytest.raises(ServerError, match="did not answer within 0.5 s; the request was cancelled"),
    ):
        client.generate({"prompt": "a", "steps": 100, "width": 512, "height": 512}, timeout=0.5)


class Transport:
    """A gRPC client that answers every call with one result or error, and says whether the ensemble is loaded."""

    def __init__(self, result: Any = None, error: InferenceServerException | None = None, ready: bool = True) -> None:
        self.result, self.error, self.ready = result, error, ready

    def async_infer(
        self, model: str, inputs: Any, callback: Any, client_timeout: float | None, timeout: int | None
    ) -> Any:
        callback(self.result, self.error)
        return SimpleNamespace(cancel=lambda: None)

    def is_model_ready(self, model: str) -> bool:
        return self.ready

    def is_server_live(self) -> bool:
        return self.ready

    def close(self) -> None:
        pass


class SlowTransport(Transport):
    """A gRPC client whose call fails only when it is told to."""

    def async_infer(
        self, model: str, inputs: Any, callback: Any, client_timeout: float | None, timeout: int | None
    ) -> Any:
        self.answer = partial(callback, None, InferenceServerException("late", status="StatusCode.INTERNAL"))
        return SimpleNamespace(cancel=lambda: None)


def ask(transport: Transport, tick: Callable[[float], None] | None = None) -> None:
    with Client("127.0.0.1:1") as client:
        client._grpc.close()
        client._grpc = transport
        client.generate({"prompt": "a cat"}, tick=tick)


def test_the_elapsed_seconds_are_told_until_the_server_answers() -> None:
    ticks: list[float] = []
    transport = SlowTransport()

    def tick(seconds: float) -> None:
        ticks.append(seconds)
        if len(ticks) == 3:
            transport.answer()

    with pytest.raises(ServerError, match="late"):
        ask(transport, tick)
    assert len(ticks) == 3
    assert ticks == sorted(ticks)


@pytest.mark.parametrize(
    ("status", "message", "raised", "words"),
    [
        ("INVALID_ARGUMENT", "steps: 0 is too few", RequestError, "^steps: 0 is too few$"),
        ("INTERNAL", "EngineError: out of memory", ServerError, "^INTERNAL: EngineError: out of"),
        (
            "UNAVAILABLE",
            "9 requests are in flight, try again",
            UnavailableError,
            "^9 requests are in flight, try again$",
        ),
    ],
)
def test_a_status_of_the_server_becomes_an_error(
    status: str, message: str, raised: type[Flux2Error], words: str
) -> None:
    with pytest.raises(raised, match=words):
        ask(Transport(error=InferenceServerException(message, status=f"StatusCode.{status}")))


def test_a_response_without_an_image_is_a_server_error() -> None:
    outputs = {"image": None, "seed_used": np.array([1])}
    with pytest.raises(ServerError, match="the server's response has no image or no seed"):
        ask(Transport(result=SimpleNamespace(as_numpy=outputs.get)))


def test_without_a_server_the_error_says_how_to_start_one() -> None:
    with (
        Client(f"127.0.0.1:{TcpPorts.free().grpc}") as client,
        pytest.raises(ServerError, match="no FLUX.2 server responds at 127.0.0.1:.* start one with: python -m serve r"),
    ):
        client.generate({"prompt": "a cat"}, timeout=5)


@pytest.mark.parametrize("words", ["Stream removed (Socket closed)", "recvmsg:Connection reset by peer"])
def test_a_server_that_ends_during_a_request_is_told_apart_from_one_that_never_was(words: str) -> None:
    error = InferenceServerException(words, status="StatusCode.UNAVAILABLE")
    with pytest.raises(ServerError, match="ended during the request; send it again when it is back"):
        ask(Transport(error=error, ready=False))


def test_a_client_looks_often_whether_a_server_has_come_back() -> None:
    attempts = 0
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Client(f"127.0.0.1:{listener.getsockname()[1]}") as client,
    ):
        listener.settimeout(0.1)
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline and attempts < 6:  # gRPC's own pauses leave time for three
            threading.Thread(target=client.responds, daemon=True).start()
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()
                attempts += 1
    assert attempts == 6
