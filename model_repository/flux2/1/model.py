"""Triton model: what clients call. Admits requests, runs the ensembles for them, and notices when a client leaves."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.errors import Flux2Error
from pipeline.request import FIELDS, Request
from serve import backend
from serve.front import Front, Options
from serve.ledger import Ledger, ledger_path
from serve.metrics import Metrics
from serve.settings import Settings, version_folder
from serve.tracing import Tracer, context_of
from serve.wire import DENOISER, IMAGE_ENCODED, IMAGE_STAGE, NUMPY, PROMPT_STAGE, TICKET

OUTPUTS = ["image", "seed_used"]


class TritonCaller:
    """One request of a client."""

    def __init__(self, request: Any, tracer: Tracer) -> None:
        self.request = request
        self.tracer = tracer
        self.trace_context = context_of(request)
        self.sender = request.get_response_sender()
        self.is_streamed = False  # whether the caller is flux2_stream, which needs the name of an error
        self._request_id = request.request_id()  # gone once it is answered

    def stage(self, name: str, since: float = 0.0) -> AbstractContextManager[None]:
        return self.tracer.span(self.trace_context, name, since)

    def is_cancelled(self) -> bool:
        return bool(self.request.is_cancelled())

    def start(self, fields: Mapping[str, Any], ticket: int) -> None:
        inputs = [pb.Tensor("ticket", np.array([ticket], np.int64))]
        for field in FIELDS:
            value = fields.get(field.name)
            if value is not None:
                values = value if field.many else [value]
                inputs.append(pb.Tensor(field.name, np.array(values, NUMPY[field.type])))
        self._call(PROMPT_STAGE, ["started"], inputs)

    def fetch(self, ticket: int) -> Any:
        (latents,) = self._call(DENOISER, ["latents"], [pb.Tensor(TICKET.name, np.array([[ticket]], np.int64))])
        return latents

    def finish(self, request: Request, latents: Any) -> Any:
        inputs = [pb.Tensor(tensor.name, tensor.pack(request)) for tensor in IMAGE_ENCODED]
        outputs = self._call(IMAGE_STAGE, OUTPUTS, [pb.Tensor.from_dlpack("latents", latents), *inputs])
        return [pb.Tensor(t.name(), t.as_numpy()) for t in outputs]

    def _call(self, model: str, outputs: list[str], inputs: list[Any]) -> list[Any]:
        response = pb.InferenceRequest(
            model_name=model, requested_output_names=outputs, inputs=inputs, request_id=self._request_id
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
        self.front = Front(Settings.read(version_folder(args)), Ledger(ledger_path()), Metrics(pb, "flux2"))

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            caller = TritonCaller(request, self.tracer)
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
