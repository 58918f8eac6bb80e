"""Generate with a running server of any runtime, so that the gate judges what is deployed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from kit.address import answers_http, grpc_address
from kit.errors import RequestError, ServerError, UsageError
from pipeline.images import decode
from pipeline.request import FIELDS
from quantize.gate.drawing import Canvas, Drawing, Generate

MODEL = "flux2"  # the ensemble of a deployment
TYPES: Mapping[str, Any] = {"TYPE_STRING": np.object_, "TYPE_INT32": np.int32, "TYPE_INT64": np.int64}
NO_LATENTS = np.empty((0, 0), np.float32)  # a server returns images only


def open_server(url: str, canvas: Canvas) -> Generate:
    """Connect to a server's gRPC port and return a function that generates a prompt from a seed.

    Raises UsageError for an address that is none, and ServerError if no FLUX.2 server answers there.
    """
    import tritonclient.grpc as grpc
    from tritonclient.utils import InferenceServerException

    address = grpc_address(url)
    client = grpc.InferenceServerClient(address)
    try:
        ready = client.is_model_ready(MODEL)
    except InferenceServerException:
        ready = False
    if not ready:
        if answers_http(address):
            raise UsageError(f"--url {url}: this is the HTTP port of a server; give its gRPC port, 8001 by default")
        raise ServerError(f"no FLUX.2 server responds at {address}; start one with: python -m serve run DEPLOY")

    def generate(prompt: str, seed: int) -> Drawing:
        fields = {"prompt": prompt.encode(), "seed": seed, "output_format": b"png", **asdict(canvas)}
        inputs = []
        for field in FIELDS:
            if fields.get(field.name) is not None:
                kind = "BYTES" if field.type == "TYPE_STRING" else field.type.removeprefix("TYPE_")
                tensor = grpc.InferInput(field.name, [1], kind)
                tensor.set_data_from_numpy(np.array([fields[field.name]], TYPES.get(field.type, np.float32)))
                inputs.append(tensor)
        try:
            image = client.infer(MODEL, inputs).as_numpy("image")
        except InferenceServerException as error:
            message = f"the server at {address} rejected the prompt {prompt!r}: {error.message()}"
            wrong = "INVALID_ARGUMENT" in str(error.status())
            raise (RequestError if wrong else ServerError)(message) from None
        if image is None or not len(image):
            raise ServerError(f"the response of the server at {address} has no image")
        return Drawing(decode(bytes(image.flat[0])), NO_LATENTS)

    return generate
