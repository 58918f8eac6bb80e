"""Triton model: the front model for clients that stream, with progress and previews before the image.

Decoupled: a response per completed step, then one with the image. It calls `flux2` like any client and reads the
progress of that request from the ledger; a client that ends its stream cancels the request.
"""

from __future__ import annotations

import secrets
import threading
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.errors import EngineError
from pipeline.images import encode_response
from pipeline.request import Encoding
from serve import backend
from serve.ledger import Ledger, ledger_path
from serve.tracing import context_of
from serve.wire import FRONT

POLL_SECONDS = 0.02


class TritonPythonModel:
    """Runs one thread per stream."""

    def initialize(self, args: dict[str, str]) -> None:
        self.ledger = Ledger(ledger_path())

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            state = (request, request.get_response_sender(), context_of(request))
            threading.Thread(target=self._serve, args=state, daemon=True).start()

    def _serve(self, request: Any, sender: Any, context: str) -> None:
        tag = secrets.randbits(62) + 1
        found: list[Any] = []
        caller = threading.Thread(target=lambda: found.append(self._call(request, tag, context)), daemon=True)
        caller.start()
        encoding = _encoding(request)
        ticket, sent = 0, 0
        while caller.is_alive():
            caller.join(POLL_SECONDS)
            ticket = ticket or self.ledger.find(tag)
            if not ticket:
                continue
            if request.is_cancelled():
                self.ledger.cancel(ticket)
                continue
            self.ledger.want_preview(ticket)
            step, steps = self.ledger.progress(ticket)
            if self.ledger.is_open(ticket) and step > sent:
                sent = step
                sender.send(pb.InferenceResponse(self._progress(ticket, step, steps, encoding)))
        if ticket:
            self.ledger.drop_preview(ticket)
        response = found[0] if found else None
        if response is None:
            backend.send(pb, sender, backend.refuse(pb, EngineError("the request was lost")))
            return
        if response.has_error():
            backend.send(pb, sender, backend.refuse(pb, backend.passed_on(str(response.error().message()))))
            return
        outputs = [pb.Tensor(t.name(), t.as_numpy()) for t in response.output_tensors()]
        backend.send(pb, sender, pb.InferenceResponse(outputs))

    def _call(self, request: Any, tag: int, context: str) -> Any:
        return pb.InferenceRequest(
            model_name=FRONT,
            request_id=request.request_id(),
            requested_output_names=["image", "seed_used"],
            inputs=[pb.Tensor(t.name(), t.as_numpy()) for t in request.inputs()],
            timeout=request.timeout(),
            parameters={**_parameters(request), "flux2_tag": tag, "flux2_trace_context": context},
        ).exec()

    def _progress(self, ticket: int, step: int, steps: int, encoding: Encoding) -> list[Any]:
        tensors = [pb.Tensor("step", np.array([step], np.int32)), pb.Tensor("steps", np.array([steps], np.int32))]
        preview = self.ledger.read_preview(ticket)
        if preview is not None:
            tensors.append(pb.Tensor("preview", np.array([encode_response(preview, encoding)], np.object_)))
        return tensors


def _encoding(request: Any) -> Encoding:
    """Return how the client wants images; what is wrong with its wish the front model says."""
    tensor = pb.get_input_tensor_by_name(request, "response_encoding")
    values = [] if tensor is None else tensor.as_numpy().reshape(-1).tolist()
    return "base64" if values in ([b"base64"], ["base64"]) else "bytes"


def _parameters(request: Any) -> dict[str, Any]:
    import json

    text = request.parameters()
    return dict(json.loads(text)) if text else {}
