"""Triton model: encode pixels as PNG, JPEG or WebP."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.errors import Flux2Error
from pipeline.images import encode, encode_response
from pipeline.request import check_encoding, check_format
from serve import backend
from serve.wire import IMAGE_ENCODED


class TritonPythonModel:
    """The last step of the ensemble; it also returns the seed that was used."""

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._encode(request) for request in requests]

    def _encode(self, request: Any) -> Any:
        pixels = backend.read(pb, request, "pixels")
        fields: dict[str, Any] = {}
        for tensor in IMAGE_ENCODED:
            fields |= tensor.unpack(backend.read(pb, request, tensor.name))
        try:
            encoding, output_format = check_encoding(fields["response_encoding"]), check_format(fields["output_format"])
            images = [encode_response(encode(image, output_format), encoding) for image in pixels]
        except Flux2Error as error:
            return backend.pass_on(pb, error)
        outputs = {"image": np.array(images, np.object_), "seed_used": np.array([fields["seed"]], np.int64)}
        return backend.respond(pb, outputs)
