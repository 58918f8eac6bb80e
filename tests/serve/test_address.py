"""Addresses of a server: what is accepted, and what a client says about a port that is not the gRPC port."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tritonclient.utils import InferenceServerException

from kit.address import answers_http, grpc_address
from kit.errors import ServerError, UsageError
from serve.client import Client


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("127.0.0.1:8001", "127.0.0.1:8001"),
        ("http://127.0.0.1:8001", "127.0.0.1:8001"),
        ("HTTP://localhost:8001/", "localhost:8001"),
        ("grpc://gpu-7.example.org:80", "gpu-7.example.org:80"),
        ("[::1]:8001", "[::1]:8001"),
        (" 127.0.0.1:8001 ", "127.0.0.1:8001"),
    ],
)
def test_an_address_may_have_a_scheme(url: str, address: str) -> None:
    assert grpc_address(url) == address


@pytest.mark.parametrize(
    "url", ["", "localhost", "localhost:", ":8001", "localhost:grpc", "localhost:0", "h:99999", "a b:1"]
)
def test_an_address_without_host_and_port_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="expected HOST:PORT of the server's gRPC port, for example 127.0.0.1:8001"):
        grpc_address(url)


def test_tls_is_refused() -> None:
    with pytest.raises(UsageError, match="--url https://host:443: https is not supported; give HOST:PORT of the gRPC"):
        grpc_address("https://host:443")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def http_port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_the_http_port_is_recognized(http_port: int) -> None:
    assert answers_http(f"127.0.0.1:{http_port}")
    said = f"127.0.0.1:{http_port} is the HTTP port of a server; give its gRPC port"
    with Client(f"http://127.0.0.1:{http_port}") as client, pytest.raises(UsageError, match=said):
        client.generate({"prompt": "x"}, timeout=5)
    assert not answers_http("127.0.0.1:9")


def test_a_deadline_is_told_in_words() -> None:
    with Client("127.0.0.1:9") as client:
        late = InferenceServerException("Deadline Exceeded", "StatusCode.DEADLINE_EXCEEDED")
        found = client._translate(late, 2.5)
    assert isinstance(found, ServerError)
    assert str(found) == "the server at 127.0.0.1:9 did not answer within 2.5 s; the request was cancelled"
