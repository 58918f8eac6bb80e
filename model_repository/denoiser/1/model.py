"""Triton model: generate requests step by step, all live ones together.

Triton's iterative sequences call `execute` with every live request; each advances by one step and is handed back to
the scheduler until it is done. So requests of different step counts, seeds and arrival times share engine calls, and
join or leave between any two steps. A slot that nobody uses arrives as a request that is not READY.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.dtypes import numpy_type
from kit.errors import EngineError, UsageError
from pipeline.denoise import Denoiser, LiveRequest
from serve import wire
from serve.settings import Settings, version_folder
from serve.stage import open_model


class TritonPythonModel:
    """Keeps one Job per live sequence; forgets those that Triton dropped (a cancelled request is never announced)."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = version_folder(args)
        self.settings = settings = Settings.read(folder)
        engine = open_model(folder, "transformer", settings)
        self.denoiser = Denoiser(settings.variant, settings.compute, engine, settings.tuning.max_rows)
        self.families: list[Any] = []
        self.jobs: dict[int, LiveRequest] = {}
        self.seen: dict[int, float] = {}
        self.live = self._metric(
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
        self.families.append(family)  # Triton ends a metric whose family is garbage
        return family.Metric(labels={}, **options)

    def execute(self, requests: list[Any]) -> list[Any]:
        now = time.monotonic()
        responses: list[Any] = [None] * len(requests)
        live: list[tuple[int, int]] = []  # position in the batch, sequence
        for position, request in enumerate(requests):
            if not _control(request, "READY"):
                responses[position] = pb.InferenceResponse([])
                continue
            sequence = _control(request, "CORRID")
            try:
                if _control(request, "START"):
                    self.jobs[sequence] = self._admit(request)
                live.append((position, sequence))
                self.seen[sequence] = now
            except (UsageError, ValueError) as error:
                responses[position] = wire.refuse(pb, UsageError(str(error)))
        before = self.denoiser.occupancy.calls, self.denoiser.occupancy.rows
        self.denoiser.step([self.jobs[sequence] for _, sequence in live])
        if live:
            self.live.observe(float(len(live)))
        self.calls.increment(self.denoiser.occupancy.calls - before[0])
        self.rows.increment(self.denoiser.occupancy.rows - before[1])
        for position, sequence in live:
            responses[position] = self._respond(requests[position], sequence)
        self._forget(now)
        return responses

    def _admit(self, request: Any) -> LiveRequest:
        """Start a job from the tokenizer's and text encoder's outputs; each has a batch axis of one."""
        width, height = wire.read(pb, request, "checked_size")[0]
        compute = self.settings.compute
        negative = wire.read_optional(pb, request, "negative_prompt_embeds", compute)
        return self.denoiser.admit(
            prompt_embeds=wire.read(pb, request, "prompt_embeds", compute)[0].copy(),
            negative_embeds=None if negative is None else negative[0].copy(),
            seed=int(wire.read(pb, request, "checked_seed")[0, 0]),
            width=int(width),
            height=int(height),
            steps=int(wire.read(pb, request, "checked_steps")[0, 0]),
            guidance=float(wire.read(pb, request, "checked_guidance")[0, 0]),
            num_images=int(wire.read(pb, request, "checked_num_images")[0, 0]),
        )

    def _respond(self, request: Any, sequence: int) -> Any:
        """Answer a finished or failed request; hand a live one back to Triton."""
        job = self.jobs[sequence]
        if job.error is None and not job.done:
            request.set_release_flags(pb.TRITONSERVER_REQUEST_RELEASE_RESCHEDULE)
            return None
        del self.jobs[sequence], self.seen[sequence]
        if job.error is not None:
            return wire.refuse(pb, EngineError(job.error))
        latents = job.image_latents()
        if not np.isfinite(latents).all():
            return wire.refuse(pb, RuntimeError("the latents are not finite; the weights or the precision are broken"))
        self.images.increment(len(latents))
        return wire.answer(pb, {"latents": latents.astype(numpy_type(self.settings.compute), copy=False)})

    def _forget(self, now: float) -> None:
        """Drop jobs that Triton no longer brings: their request was cancelled or timed out."""
        for sequence in [s for s, seen in self.seen.items() if now - seen > self.settings.tuning.idle_seconds]:
            del self.jobs[sequence], self.seen[sequence]


def _control(request: Any, name: str) -> int:
    return int(wire.read(pb, request, name).item())
