"""Traces of requests: a collector of this test gets the spans of the client's trace from the real server."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpc

from serve.client import Client, ImageResponse, fields_to_inputs
from serve.launch import Server
from serve.tracing import Tracer
from tests.conftest import ByFamily

FIELDS = {"prompt": "a cat", "steps": 3, "width": 64, "height": 64, "seed": 1}
TRACE = "0af7651916cd43dd8448eb211c80319c"
CALLER = "b7ad6b7169203331"
STAGES = ["queue", "prompt", "denoise", "image"]


class Collector:
    """Receives OTLP over HTTP, in JSON from Triton and in protobuf from Python; keeps (trace, span, parent, name)."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, str, str]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.spans += _spans(body, self.headers["content-type"])
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def of(self, trace: str) -> dict[str, tuple[str, str]]:
        """Return the spans of a trace: name to (span, parent)."""
        return {name: (span, parent) for found, span, parent, name in list(self.spans) if found == trace}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _spans(body: bytes, kind: str) -> Iterator[tuple[str, str, str, str]]:
    if "json" in kind:
        for resource in json.loads(body)["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    yield span["traceId"], span["spanId"], span.get("parentSpanId", ""), span["name"]
        return
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex(), span.name


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.mark.server
def test_the_stages_of_a_request_are_spans_of_its_clients_trace(
    collector: Collector, deployment_of: ByFamily, tmp_path: Path
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    with Server(deployment_of("klein"), log=tmp_path / "log", otlp=collector.url) as server:
        client = grpc.InferenceServerClient(server.url)
        client.infer("flux2", fields_to_inputs(FIELDS), headers=headers)
        deadline = time.monotonic() + 30
        while not {*STAGES} <= {*collector.of(TRACE)} and time.monotonic() < deadline:
            time.sleep(0.1)
        client.close()
        with Client(server.url) as streaming:  # traced too, in a trace of its own, and none of the server's ends
            *_, last = streaming.stream(FIELDS, timeout=60)
            assert isinstance(last, ImageResponse)
        assert server.ledger.heals == 0
    found = collector.of(TRACE)
    parents = {found[name][1] for name in STAGES}
    assert len(parents) == 1, "the stages have one parent, the span of the model that the client called"
    spans = {span: (name, parent) for name, (span, parent) in found.items()}
    parent = spans[parents.pop()][1]
    while parent in spans:  # Triton has a span for the request around that of the model
        parent = spans[parent][1]
    assert parent == CALLER
    streamed = [trace for trace, _, _, name in collector.spans if name == "denoise" and trace != TRACE]
    assert streamed


@pytest.mark.server
def test_a_collector_that_does_not_answer_delays_nothing(deployment_of: ByFamily, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as silent:  # takes connections and never answers
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/traces"
        with Server(deployment_of("klein"), log=tmp_path / "log", otlp=url) as server:
            with Client(server.url) as client:
                seconds = [client.generate(FIELDS | {"seed": seed}, timeout=60).seconds for seed in range(15)]
            assert max(seconds) < 9, "an export gives up after ten seconds; no request waits for it"
            assert server.ledger.heals == 0
            begin = time.monotonic()
        assert time.monotonic() - begin < 30


def test_without_a_collector_or_a_trace_nothing_is_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLUX2_OTLP", raising=False)
    ran = []
    with Tracer().span('{"traceparent": "00-1-2-01"}', "stage"):
        ran.append(1)
    monkeypatch.setenv("FLUX2_OTLP", "http://127.0.0.1:9/v1/traces")
    tracer: Any = Tracer()
    with tracer.span("", "stage"):
        ran.append(2)
    assert ran == [1, 2]
