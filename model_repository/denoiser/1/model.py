"""Triton model: denoise all live requests together, step by step.

The front model calls it several times for a request, each time with the ticket and an action: `find` says which of the
request's prompts and references the store lacks, `bring` hands over one of them, `start` starts the request, `fetch`
returns the latents once the ledger says that they are done.

`execute` only hands requests to a thread and returns; the thread chooses before each step which requests share the next
engine call. So requests with different step counts, seeds and arrival times share calls, join and leave between any two
steps, and their tensors cross the process boundary once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.dtypes import numpy_type
from kit.engine import Array
from kit.errors import EngineError, Flux2Error, RequestError
from kit.ports import KV_PARTS, PartName
from pipeline.denoise import Denoiser
from pipeline.live_request import LiveRequest
from pipeline.preview import PREVIEW_FILE, PreviewMap
from pipeline.scheduling import Scheduler
from pipeline.store import Event, Store
from serve import backend
from serve.intake import Intake, admit
from serve.ledger import Ledger, ledger_path
from serve.metrics import Metrics
from serve.preview_writer import PreviewWriter
from serve.settings import Settings, version_folder
from serve.stage import open_models
from serve.step_loop import Answer, StepJob, StepLoop
from serve.wire import ACTION, DENOISED, FRONT, KEYS, LATENTS, MASK, TICKET, request_from_tensors

DENOISER_PARTS: tuple[PartName, ...] = ("transformer", *KV_PARTS)


class TritonPythonModel:
    """Admits requests to a StepLoop; serves only requests that the front model holds a ticket for.

    No response waits for a step: Triton would never answer a request whose process died meanwhile.
    """

    def initialize(self, args: dict[str, str]) -> None:
        folder = version_folder(args)
        self.settings = settings = Settings.read(folder)
        engines = open_models(folder, [part for part in DENOISER_PARTS if part in settings.ports], settings)
        self.metrics = Metrics(pb, "denoiser")
        self.store = Store(settings.tuning.cache_bytes, self._count)
        self.intake = Intake(self.store)
        self.denoiser = Denoiser(
            settings.variant,
            settings.compute,
            engines["transformer"],
            settings.tuning.max_rows,
            engines.get("transformer_extract"),
            engines.get("transformer_cached"),
            self.store,
        )
        self.ledger = Ledger(ledger_path())
        self.ledger.count_denoiser()
        path = folder / PREVIEW_FILE
        self.previews = PreviewWriter(PreviewMap.load(path), self.ledger) if path.is_file() else None
        self.answers: dict[int, Answer] = {}  # by ticket
        scheduler = Scheduler(settings.tuning.max_rows, settings.tuning.policy)
        self.loop = StepLoop(self.denoiser, scheduler, self._observe, self._extracted)

    def execute(self, requests: list[Any]) -> list[Any]:
        for ticket in [ticket for ticket in self.answers if not self.ledger.is_open(ticket)]:
            del self.answers[ticket]  # cancelled after it was done
        self.intake.sweep(self.ledger.is_open)
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
        """Do what the request's action says."""
        ticket = int(backend.read(pb, request, TICKET.name).item())
        if not self.ledger.is_open(ticket):
            raise RequestError(f"the denoiser is internal; send requests to the model {FRONT!r}")
        action = backend.read(pb, request, ACTION).item().decode()
        if action == "fetch":
            return self._fetch(ticket)
        keys = [key.decode() for key in backend.read(pb, request, KEYS).reshape(-1).tolist()]
        if action in ("find", "find again"):
            missing = self.intake.find(ticket, keys, again=action == "find again")
            return backend.respond(pb, {"missing": np.array([missing], np.int32)})
        if action == "bring":
            self.intake.bring(ticket, keys[0], *self._item(request))
            self.metrics.set("flux2_cache_bytes", self.store.bytes)
        else:
            self.loop.submit(self._admit(request, ticket, keys))
        return backend.respond(pb, {"started": np.array([[ticket]], np.int64)})

    def _item(self, request: Any) -> tuple[str, Array]:
        """Return the item that a request brings, without its batch axis, and its name."""
        for name in ("prompt_embeds", LATENTS, MASK):
            dtype = self.settings.compute if name == "prompt_embeds" else None
            array = backend.read_optional(pb, request, name, dtype)
            if array is not None:
                return name, array[0]
        raise RequestError(f"{KEYS}: nothing came with the key")

    def _fetch(self, ticket: int) -> Any:
        answer = self.answers.pop(ticket, None)
        if answer is None:
            raise EngineError("the latents are gone: the denoiser's process ended unexpectedly")
        return self._respond(answer)

    def _admit(self, request: Any, ticket: int, keys: list[str]) -> StepJob:
        """Make a job from a request and the items that were brought or found for it."""
        checked = request_from_tensors({t.name: backend.read(pb, request, t.name) for t in DENOISED})
        live = admit(self.denoiser, checked, keys, self.intake.take(ticket, keys))

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

    def _count(self, event: Event, kind: str) -> None:
        names = {"hit": "flux2_cache_hits_total", "miss": "flux2_cache_misses_total"}
        self.metrics.add(names.get(event, "flux2_cache_evictions_total"), label=kind)

    def _extracted(self, seconds: float) -> None:
        self.metrics.observe("flux2_extract_seconds", seconds)
        self.metrics.set("flux2_cache_bytes", self.store.bytes)

    def _observe(self, live: int, requests: int, rows: int, seconds: float) -> None:
        self.metrics.observe("flux2_denoiser_live_requests", live)
        self.metrics.observe("flux2_denoiser_call_requests", requests)
        self.metrics.observe("flux2_step_seconds", seconds)
        self.metrics.add("flux2_steps_total", requests)
        self.metrics.add("flux2_denoiser_engine_calls_total")
        self.metrics.add("flux2_denoiser_engine_rows_total", rows)
