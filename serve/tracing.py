"""OpenTelemetry spans of a request's stages, as children of Triton's span of the model that the client called.

Triton takes the trace context from the client's request and exports a span for `flux2`. It would export the calls of
other models too, but their trace ends with the call of `execute`, and `flux2` makes them later from threads: passing
the trace on ends Triton 24.10 with a segmentation fault. So `flux2` exports a span of its own for each stage.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VARIABLE = "FLUX2_OTLP"  # the collector's address; set by `serve run --otlp`
SERVICE = "flux2"


class Tracer:
    """Exports spans to the collector that the environment names; without one it does nothing."""

    def __init__(self) -> None:
        self._tracer: Any = None
        if url := os.environ.get(VARIABLE):
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            provider = TracerProvider(resource=Resource({"service.name": SERVICE}), shutdown_on_exit=False)
            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(url), schedule_delay_millis=1000))
            self._provider = provider
            self._tracer = provider.get_tracer(SERVICE)

    @contextmanager
    def span(self, parent: str, name: str, since: float = 0.0, **attributes: int | str) -> Iterator[None]:
        """Export what happens inside as a span that began `since` seconds ago.

        `parent` is the JSON of the parent's context, as Triton gives it; empty if the request is not traced.
        """
        if self._tracer is None or not parent:
            yield
            return
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        context = TraceContextTextMapPropagator().extract(json.loads(parent))
        start = time.time_ns() - round(since * 1e9)
        with self._tracer.start_as_current_span(name, context, start_time=start, attributes=attributes):
            yield

    def close(self) -> None:
        """Export what is left, for at most a few seconds."""
        if self._tracer is not None:
            self._provider.force_flush(3000)


def context_of(request: Any) -> str:
    """Return the trace context of a request of Triton's python backend; empty if it is not traced."""
    trace = request.trace()
    return (trace.get_context() or "") if trace is not None and hasattr(trace, "get_context") else ""


def triton_options(url: str) -> list[str]:
    """Return the options with which tritonserver traces all requests to a collector."""
    settings = ("mode=opentelemetry", "rate=1", "level=TIMESTAMPS", "count=-1")
    exporter = (f"opentelemetry,url={url}", f"opentelemetry,resource=service.name={SERVICE}")
    return [word for setting in (*settings, *exporter) for word in ("--trace-config", setting)]
