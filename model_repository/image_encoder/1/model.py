"""Triton model: encode pixels as PNG, JPEG or WebP."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.errors import Flux2Error
from serve import triton_io
from serve.pictures import encode
from serve.request import check_format


class TritonPythonModel:
    """The ensemble's last step; also passes on the seed that was used."""

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._encode(request) for request in requests]

    def _encode(self, request: Any) -> Any:
        pixels, name, seed = (
            triton_io.read(pb, request, port) for port in ("pixels", "checked_format", "checked_seed")
        )
        try:
            pictures = [encode(picture, check_format(name.flat[0])) for picture in pixels]
        except Flux2Error as error:
            return triton_io.refuse(pb, error)
        return triton_io.answer(pb, {"image": np.array(pictures, np.object_), "seed_used": seed.reshape(1)})
