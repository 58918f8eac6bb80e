"""Triton model: decode a reference image or a mask, and encode images with the VAE encoder.

The front model calls it for images that the denoiser's store lacks. Between decoding and encoding it looks whether the
request is still wanted.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.engine import Array
from kit.errors import CancelledError, Flux2Error, RequestError
from pipeline.inpainting import prepare_image, prepare_mask
from pipeline.pictures import decode_rgb
from pipeline.references import encode, prepare
from runtimes.trt.record import RECORD, read_record
from serve import backend
from serve.ledger import Ledger, ledger_path
from serve.metrics import Metrics
from serve.settings import Settings, version_folder
from serve.stage import open_model
from serve.tensorrt_deploy import image_refusal
from serve.wire import FRONT, VAE_ENCODER


class TritonPythonModel:
    """Serves requests that the front model holds a ticket for, one at a time."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = version_folder(args)
        self.settings = Settings.read(folder)
        self.engine = open_model(folder, "vae_encoder", self.settings)
        has_plans = "vae_encoder" in self.settings.tensorrt
        self.record = read_record(folder / RECORD) if has_plans else None
        self.ledger = Ledger(ledger_path())
        self.metrics = Metrics(pb, VAE_ENCODER)

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            try:
                responses.append(backend.respond(pb, self._serve(request)))
            except Flux2Error as error:
                responses.append(backend.pass_on(pb, error))
        return responses

    def _serve(self, request: Any) -> dict[str, Array]:
        ticket = int(backend.read(pb, request, "ticket").item())
        if not self.ledger.is_open(ticket):
            raise RequestError(f"the VAE encoder is internal; send requests to the model {FRONT!r}")
        self._check_wanted(ticket)
        data, field, role = (backend.read(pb, request, name).item() for name in ("image", "field", "role"))
        image = decode_rgb(data, field.decode())
        self._check_wanted(ticket)
        if role == b"mask":
            width, height = backend.read(pb, request, "size").tolist()
            return {"mask": prepare_mask(image, width, height)[:, 0]}
        pixels = prepare(image) if role == b"reference" else prepare_image(image)
        if self.record is not None and (why := image_refusal(self.record, pixels.shape[2], pixels.shape[1])):
            raise RequestError(f"{field.decode()}: {why}")
        start = time.perf_counter()
        latents = encode(pixels, self.engine, self.settings.compute)
        self.metrics.observe("flux2_vae_encoder_seconds", time.perf_counter() - start)
        return {"latents": np.ascontiguousarray(latents)}

    def _check_wanted(self, ticket: int) -> None:
        if not self.ledger.is_wanted(ticket):
            raise CancelledError("the request was given up")
