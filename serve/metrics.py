"""The metrics that the models of a deployment export through Triton, as one table; names by Prometheus conventions."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Metric:
    """One metric family."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    model: str  # the model that exports it
    about: str
    label: str = ""
    buckets: tuple[float, ...] = ()


FLUSH_SECONDS = 0.2
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0)
_COUNTS = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
METRICS = (
    Metric("flux2_requests_total", "counter", "flux2", "requests received"),
    Metric("flux2_images_total", "counter", "flux2", "images returned"),
    Metric("flux2_request_seconds", "histogram", "flux2", "seconds of completed requests", buckets=_SECONDS),
    Metric("flux2_queue_seconds", "histogram", "flux2", "seconds that requests waited", buckets=_SECONDS),
    Metric("flux2_queue_oldest_seconds", "gauge", "flux2", "age of the oldest waiting request"),
    Metric("flux2_requests_waiting", "gauge", "flux2", "requests that wait"),
    Metric("flux2_requests_live", "gauge", "flux2", "requests that are worked on"),
    Metric("flux2_bytes_in_flight", "gauge", "flux2", "bytes of fields, images included, and of text embeddings"),
    Metric("flux2_rejections_total", "counter", "flux2", "rejected requests", "reason"),
    Metric("flux2_cancellations_total", "counter", "flux2", "requests whose client left"),
    Metric("flux2_failures_total", "counter", "flux2", "requests that failed in the server"),
    Metric("flux2_heals_total", "counter", "flux2", "restarts of a model or of the server by `serve run`"),
    Metric("flux2_steps_total", "counter", "denoiser", "denoising steps, counted per request"),
    Metric("flux2_step_seconds", "histogram", "denoiser", "seconds of an engine call", buckets=_SECONDS),
    Metric("flux2_extract_seconds", "histogram", "denoiser", "seconds of reading references once", buckets=_SECONDS),
    Metric("flux2_vae_encoder_seconds", "histogram", "vae_encoder", "seconds of encoding an image", buckets=_SECONDS),
    Metric("flux2_cache_hits_total", "counter", "denoiser", "items found in the cache", "kind"),
    Metric("flux2_cache_misses_total", "counter", "denoiser", "items computed because the cache lacked them", "kind"),
    Metric("flux2_cache_evictions_total", "counter", "denoiser", "items that made room for others", "kind"),
    Metric("flux2_cache_bytes", "gauge", "denoiser", "bytes in the cache"),
    Metric("flux2_denoiser_live_requests", "histogram", "denoiser", "requests in the denoiser", buckets=_COUNTS),
    Metric("flux2_denoiser_call_requests", "histogram", "denoiser", "requests per engine call", buckets=_COUNTS),
    Metric("flux2_denoiser_engine_calls_total", "counter", "denoiser", "engine calls"),
    Metric("flux2_denoiser_engine_rows_total", "counter", "denoiser", "rows of all engine calls"),
)


class Metrics:
    """The metrics of one model inside Triton; thread-safe.

    Each change of a metric is a message to the server, which takes as long as a small engine call. So changes are
    collected and sent by a thread of their own.
    """

    def __init__(self, pb: Any, model: str) -> None:
        self._kinds = {
            "counter": pb.MetricFamily.COUNTER,
            "gauge": pb.MetricFamily.GAUGE,
            "histogram": pb.MetricFamily.HISTOGRAM,
        }
        self._table = {metric.name: metric for metric in METRICS if metric.model == model}
        # Triton removes a metric when its family is garbage collected
        self._families = {
            m.name: pb.MetricFamily(name=m.name, description=m.about, kind=self._kinds[m.kind])
            for m in self._table.values()
        }
        self._metrics: dict[tuple[str, str], Any] = {}
        self._lock = threading.Lock()
        self._added: dict[tuple[str, str], float] = {}
        self._gauges: dict[str, float] = {}
        self._observed: list[tuple[str, float]] = []
        for metric in self._table.values():
            if not metric.label:
                self._get(metric.name, "")
        threading.Thread(target=self._run, name="metrics", daemon=True).start()

    def add(self, name: str, amount: float = 1, label: str = "") -> None:
        """Increase a counter."""
        with self._lock:
            self._added[name, label] = self._added.get((name, label), 0.0) + amount

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        with self._lock:
            self._gauges[name] = value

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram."""
        with self._lock:
            self._observed.append((name, value))

    def _run(self) -> None:
        sent: dict[str, float] = {}
        while True:
            time.sleep(FLUSH_SECONDS)
            with self._lock:
                added, self._added = self._added, {}
                observed, self._observed = self._observed, []
                gauges = {name: value for name, value in self._gauges.items() if sent.get(name) != value}
            sent |= gauges
            for (name, label), amount in added.items():
                if amount > 0:
                    self._get(name, label).increment(amount)
            for name, value in gauges.items():
                self._get(name, "").set(value)
            for name, value in observed:
                self._get(name, "").observe(value)

    def _get(self, name: str, label: str) -> Any:
        if (name, label) not in self._metrics:
            metric = self._table[name]
            options = {"buckets": list(metric.buckets)} if metric.buckets else {}
            labels = {metric.label: label} if metric.label else {}
            self._metrics[name, label] = self._families[name].Metric(labels=labels, **options)
        return self._metrics[name, label]
