"""Triton model: denoise all live requests together, one step per execution.

Triton's iterative sequences call `execute` with every live request. Each advances by one step and is handed back to the
scheduler until it is done, so requests with different step counts, seeds and arrival times share engine calls, and can
join or leave between any two steps. An unused slot arrives as a request that is not READY.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.dtypes import numpy_type
from kit.errors import EngineError, RequestError
from pipeline.denoise import Denoiser, LiveRequest
from serve import backend
from serve.settings import Settings, version_folder
from serve.stage import open_model
from serve.wire import DENOISER, request_from_tensors


class TritonPythonModel:
    """Keeps one LiveRequest per sequence.

    Triton does not announce a cancelled request, so those that stop coming are dropped after a while.
    """

    def initialize(self, args: dict[str, str]) -> None:
        folder = version_folder(args)
        self.settings = settings = Settings.read(folder)
        engine = open_model(folder, "transformer", settings)
        self.denoiser = Denoiser(settings.variant, settings.compute, engine, settings.tuning.max_rows)
        self.families: list[Any] = []
        self.live: dict[int, LiveRequest] = {}  # by sequence
        self.seen: dict[int, float] = {}  # when each sequence last came
        self.live_per_execution = self._metric(
            "flux2_denoiser_live_requests",
            "Live requests per execution of the denoiser",
            pb.MetricFamily.HISTOGRAM,
            buckets=[float(n) for n in range(1, settings.tuning.live_requests + 1)],
        )
        self.calls = self._metric("flux2_denoiser_engine_calls", "Transformer calls", pb.MetricFamily.COUNTER)
        self.rows = self._metric("flux2_denoiser_engine_rows", "Rows of all transformer calls", pb.MetricFamily.COUNTER)
        self.images = self._metric("flux2_images", "Images denoised to the end", pb.MetricFamily.COUNTER)

    def _metric(self, name: str, description: str, kind: Any, **options: Any) -> Any:
        family = pb.MetricFamily(name=name, description=description, kind=kind)
        self.families.append(family)  # Triton removes a metric when its family is garbage collected
        return family.Metric(labels={}, **options)

    def execute(self, requests: list[Any]) -> list[Any]:
        now = time.monotonic()
        responses: list[Any] = [None] * len(requests)
        ready: list[tuple[int, int]] = []  # (position in the batch, sequence)
        for position, request in enumerate(requests):
            if not _control(request, "READY"):
                responses[position] = pb.InferenceResponse([])
                continue
            sequence = _control(request, "CORRID")
            try:
                if _control(request, "START"):
                    self.live[sequence] = self._admit(request)
                ready.append((position, sequence))
                self.seen[sequence] = now
            except RequestError as error:
                responses[position] = backend.refuse(pb, error)
        before = self.denoiser.occupancy.calls, self.denoiser.occupancy.rows
        self.denoiser.step([self.live[sequence] for _, sequence in ready])
        if ready:
            self.live_per_execution.observe(float(len(ready)))
        self.calls.increment(self.denoiser.occupancy.calls - before[0])
        self.rows.increment(self.denoiser.occupancy.rows - before[1])
        for position, sequence in ready:
            responses[position] = self._respond(requests[position], sequence)
        self._forget(now)
        return responses

    def _admit(self, request: Any) -> LiveRequest:
        """Start a request from the outputs of the tokenizer and the text encoder; each has a batch axis of one."""
        checked = request_from_tensors({t.name: backend.read(pb, request, t.name) for t in DENOISER})
        compute = self.settings.compute
        negative = backend.read_optional(pb, request, "negative_prompt_embeds", compute)
        return self.denoiser.admit(
            checked,
            backend.read(pb, request, "prompt_embeds", compute)[0].copy(),
            None if negative is None else negative[0].copy(),
        )

    def _respond(self, request: Any, sequence: int) -> Any:
        """Respond to a finished or failed request; hand an unfinished one back to Triton."""
        live = self.live[sequence]
        if live.error is None and not live.done:
            request.set_release_flags(pb.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
            return None
        del self.live[sequence], self.seen[sequence]
        if live.error is not None:
            return backend.refuse(pb, EngineError(live.error))
        latents = live.image_latents()
        if not np.isfinite(latents).all():
            return backend.refuse(pb, EngineError("the latents are not finite; check the weights and the precision"))
        self.images.increment(len(latents))
        return backend.respond(pb, {"latents": latents.astype(numpy_type(self.settings.compute), copy=False)})

    def _forget(self, now: float) -> None:
        """Drop the requests that Triton no longer sends because they were cancelled or timed out."""
        for sequence in [s for s, seen in self.seen.items() if now - seen > self.settings.tuning.idle_seconds]:
            del self.live[sequence], self.seen[sequence]


def _control(request: Any, name: str) -> int:
    return int(backend.read(pb, request, name).item())
