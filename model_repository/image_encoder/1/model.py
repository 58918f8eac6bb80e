"""Triton model: encode pixels as PNG, JPEG or WebP."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.errors import Flux2Error
from pipeline.images import encode
from pipeline.request import check_format
from serve import wire


class TritonPythonModel:
    """The ensemble's last step; also passes on the seed that was used."""

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._encode(request) for request in requests]

    def _encode(self, request: Any) -> Any:
        pixels, name, seed = (wire.read(pb, request, port) for port in ("pixels", "checked_format", "checked_seed"))
        try:
            images = [encode(image, check_format(name.flat[0])) for image in pixels]
        except Flux2Error as error:
            return wire.refuse(pb, error)
        return wire.answer(pb, {"image": np.array(images, np.object_), "seed_used": seed.reshape(1)})
