"""Triton model: what clients call. Admits requests, runs the ensembles for them, and notices when a client leaves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.engine import Array
from kit.errors import Flux2Error
from pipeline.request import Request
from serve import backend
from serve.front import Front
from serve.incoming import Options
from serve.ledger import Ledger, ledger_path
from serve.metrics import Metrics
from serve.settings import Settings, version_folder
from serve.start import Starter
from serve.tracing import Tracer, context_of
from serve.wire import ACTION, DENOISER, IMAGE_ENCODED, IMAGE_STAGE, TICKET

OUTPUTS = ["image", "seed_used"]


class TritonCaller:
    """One request of a client."""

    def __init__(self, request: Any, tracer: Tracer, starter: Starter) -> None:
        self.request = request
        self.starter = starter
        self.tracer = tracer
        self.trace_context = context_of(request)
        self.sender = request.get_response_sender()
        self.is_streamed = False  # whether the caller is flux2_stream, which needs the name of an error
        self._request_id = request.request_id()  # gone once it is answered

    def stage(self, name: str, since: float = 0.0) -> AbstractContextManager[None]:
        return self.tracer.span(self.trace_context, name, since)

    def is_cancelled(self) -> bool:
        return bool(self.request.is_cancelled())

    def start(self, request: Request, ticket: int, cache: bool) -> None:
        self.starter.start(request, ticket, self._arrays, cache)

    def fetch(self, ticket: int) -> Any:
        inputs = {TICKET.name: np.array([[ticket]], np.int64), ACTION: np.array([[b"fetch"]], np.object_)}
        (latents,) = self._call(DENOISER, ["latents"], inputs)
        return latents

    def finish(self, request: Request, latents: Any) -> Any:
        inputs = {tensor.name: tensor.pack(request) for tensor in IMAGE_ENCODED}
        outputs = self._call(IMAGE_STAGE, OUTPUTS, inputs, pb.Tensor.from_dlpack("latents", latents))
        return [pb.Tensor(t.name(), t.as_numpy()) for t in outputs]

    def _arrays(self, model: str, outputs: list[str], inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        return {t.name(): t.as_numpy() for t in self._call(model, outputs, inputs)}

    def _call(self, model: str, outputs: list[str], inputs: Mapping[str, Array], *tensors: Any) -> list[Any]:
        response = pb.InferenceRequest(
            model_name=model,
            requested_output_names=outputs,
            inputs=[*(pb.Tensor(name, value) for name, value in inputs.items()), *tensors],
            request_id=self._request_id,
        ).exec()
        if response.has_error():
            raise backend.passed_on(str(response.error().message()))
        return list(response.output_tensors())

    def succeed(self, outputs: Any) -> None:
        backend.send(pb, self.sender, pb.InferenceResponse(outputs))

    def fail(self, error: Exception) -> None:
        make = backend.pass_on if self.is_streamed else backend.refuse
        backend.send(pb, self.sender, make(pb, error))


class TritonPythonModel:
    """Hands requests to a Front."""

    def initialize(self, args: dict[str, str]) -> None:
        self.tracer = Tracer()
        settings, ledger = Settings.read(version_folder(args)), Ledger(ledger_path())
        self.starter = Starter(settings, ledger)
        self.front = Front(settings, ledger, Metrics(pb, "flux2"))

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            caller = TritonCaller(request, self.tracer, self.starter)
            try:
                fields = backend.read_fields(pb, request)
                options = Options.read(request.timeout(), request.parameters())
                caller.is_streamed = options.tag != 0
                caller.trace_context = options.trace_context or caller.trace_context
            except Flux2Error as error:
                caller.fail(error)
                continue
            self.front.receive(caller, fields, options)

    def finalize(self) -> None:
        self.front.close()
        self.tracer.close()
