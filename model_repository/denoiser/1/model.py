"""Triton model: denoise all live requests together, step by step.

`execute` only hands requests to a thread and returns; the thread chooses before each step which requests share the next
engine call. So requests with different step counts, seeds and arrival times share calls, join and leave between any two
steps, and their tensors cross the process boundary once. The ledger tells the front model when a request is done; a
request with nothing but a ticket then fetches the latents.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.dtypes import numpy_type
from kit.errors import EngineError, Flux2Error, RequestError
from pipeline.denoise import Denoiser
from pipeline.live_request import LiveRequest
from pipeline.preview import PREVIEW_FILE, PreviewMap
from pipeline.scheduling import Scheduler
from serve import backend
from serve.ledger import Ledger, ledger_path
from serve.metrics import Metrics
from serve.preview_writer import PreviewWriter
from serve.settings import Settings, version_folder
from serve.stage import open_model
from serve.step_loop import Answer, StepJob, StepLoop
from serve.wire import DENOISED, FRONT, TICKET, request_from_tensors


class TritonPythonModel:
    """Admits requests to a StepLoop; serves only requests that the front model holds a ticket for.

    No response waits for a step: Triton would never answer a request whose process died meanwhile.
    """

    def initialize(self, args: dict[str, str]) -> None:
        folder = version_folder(args)
        self.settings = settings = Settings.read(folder)
        engine = open_model(folder, "transformer", settings)
        self.denoiser = Denoiser(settings.variant, settings.compute, engine, settings.tuning.max_rows)
        self.metrics = Metrics(pb, "denoiser")
        self.ledger = Ledger(ledger_path())
        self.ledger.count_denoiser()
        path = folder / PREVIEW_FILE
        self.previews = PreviewWriter(PreviewMap.load(path), self.ledger) if path.is_file() else None
        self.answers: dict[int, Answer] = {}  # by ticket
        self.loop = StepLoop(self.denoiser, Scheduler(settings.tuning.max_rows, settings.tuning.policy), self._observe)

    def execute(self, requests: list[Any]) -> list[Any]:
        for ticket in [ticket for ticket in self.answers if not self.ledger.is_open(ticket)]:
            del self.answers[ticket]  # cancelled after it was done
        responses = []
        for request in requests:
            try:
                responses.append(self._serve(request))
            except Flux2Error as error:
                responses.append(backend.pass_on(pb, error))
        return responses

    def finalize(self) -> None:
        self.loop.close()

    def _serve(self, request: Any) -> Any:
        """Start a request, or return the latents of one."""
        ticket = int(backend.read(pb, request, TICKET.name).item())
        if not self.ledger.is_open(ticket):
            raise RequestError(f"the denoiser is internal; send requests to the model {FRONT!r}")
        if ticket in self.answers:
            return self._respond(self.answers.pop(ticket))
        self.loop.submit(self._admit(request, ticket))
        return backend.respond(pb, {"started": np.array([[ticket]], np.int64)})

    def _admit(self, request: Any, ticket: int) -> StepJob:
        """Make a job from the outputs of the tokenizer and the text encoder; each has a batch axis of one."""
        checked = request_from_tensors({t.name: backend.read(pb, request, t.name) for t in DENOISED})
        compute = self.settings.compute
        negative = backend.read_optional(pb, request, "negative_prompt_embeds", compute)
        live = self.denoiser.admit(
            checked,
            backend.read(pb, request, "prompt_embeds", compute)[0].copy(),
            None if negative is None else negative[0].copy(),
        )

        def advanced(live: LiveRequest) -> None:
            if self.previews is not None:
                self.previews.submit(ticket, live)
            self.ledger.advance(ticket, live.index, len(live.times))

        def answer(answer: Answer) -> None:
            self.answers[ticket] = answer
            self.ledger.finish(ticket)

        advanced(live)
        return StepJob(
            live,
            answer=answer,
            wanted=lambda: self.ledger.is_wanted(ticket),
            advanced=advanced,
            batch=self.ledger.is_batch(ticket),
        )

    def _respond(self, answer: Answer) -> Any:
        if isinstance(answer, Exception):
            return backend.pass_on(pb, answer)
        if not np.isfinite(answer).all():
            return backend.pass_on(pb, EngineError("the latents are not finite; check the weights and the precision"))
        return backend.respond(pb, {"latents": answer.astype(numpy_type(self.settings.compute), copy=False)})

    def _observe(self, live: int, requests: int, rows: int, seconds: float) -> None:
        self.metrics.observe("flux2_denoiser_live_requests", live)
        self.metrics.observe("flux2_denoiser_call_requests", requests)
        self.metrics.observe("flux2_step_seconds", seconds)
        self.metrics.add("flux2_steps_total", requests)
        self.metrics.add("flux2_denoiser_engine_calls_total")
        self.metrics.add("flux2_denoiser_engine_rows_total", rows)
