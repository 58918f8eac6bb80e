"""A small client over tritonclient's gRPC: fields in, encoded images out."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from kit.errors import CheckFailed, Flux2Error, RequestError, ServerError, UsageError
from pipeline.request import FIELDS, Field, FieldType
from serve.triton_config import ENSEMBLE

_NUMPY: dict[FieldType, Any] = {"TYPE_INT32": np.int32, "TYPE_INT64": np.int64, "TYPE_FP32": np.float32}
_WIRE: dict[FieldType, str] = {
    "TYPE_STRING": "BYTES",
    "TYPE_INT32": "INT32",
    "TYPE_INT64": "INT64",
    "TYPE_FP32": "FP32",
}


@dataclass(frozen=True)
class ImageResponse:
    """The answer to one request: encoded images, the seed that was used, and the seconds it took."""

    images: list[bytes]
    seed: int
    seconds: float


def fields_to_inputs(fields: Mapping[str, Any]) -> list[Any]:
    """Turn fields into gRPC inputs of shape [1]; None is left out.

    Raises RequestError for an unknown field or a value that is not of the field's type.
    """
    known = {field.name: field for field in FIELDS}
    inputs = []
    for name, value in fields.items():
        if value is None:
            continue
        if name not in known:
            raise RequestError(f"unknown field {name!r}; there are: {', '.join(known)}")
        tensor = grpc.InferInput(name, [1], _WIRE[known[name].type])
        tensor.set_data_from_numpy(_array(known[name], value))
        inputs.append(tensor)
    return inputs


def _array(field: Field, value: Any) -> Any:
    if field.type == "TYPE_STRING":
        return np.array([value.encode() if isinstance(value, str) else value], np.object_)
    kind = _NUMPY[field.type]
    try:
        number = np.array([value])
        fits = kind is np.float32 or (np.iinfo(kind).min <= int(value) <= np.iinfo(kind).max and int(value) == value)
        if fits and number.dtype.kind in "iuf":
            return number.astype(kind)
    except (TypeError, ValueError, OverflowError):
        pass  # told below, as every other value that does not fit
    raise RequestError(f"{field.name}: {value!r} is not a {_WIRE[field.type]} value")


class Client:
    """Asks one server for images; safe to use from several threads."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._grpc = grpc.InferenceServerClient(url)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._grpc.close()

    def ready(self) -> bool:
        """Tell whether the server answers and says that the ensemble is loaded."""
        try:
            return bool(self._grpc.is_model_ready(ENSEMBLE))
        except InferenceServerException:
            return False

    def generate(
        self,
        fields: Mapping[str, Any],
        timeout: float | None = None,
        tick: Callable[[float], None] | None = None,
    ) -> ImageResponse:
        """Ask for one request and wait; `tick` is called with the seconds gone, about ten times a second.

        Raises RequestError when the server calls the request wrong, ServerError for everything else. An interrupt
        cancels the call.
        """
        answers: queue.SimpleQueue[tuple[Any, InferenceServerException | None]] = queue.SimpleQueue()
        start = time.perf_counter()
        call = self._grpc.async_infer(
            ENSEMBLE,
            fields_to_inputs(fields),
            callback=lambda result, error: answers.put((result, error)),
            client_timeout=timeout,
        )
        try:
            while True:
                try:
                    result, error = answers.get(timeout=0.1)
                    break
                except queue.Empty:
                    if tick is not None:
                        tick(time.perf_counter() - start)
        except BaseException:
            call.cancel()
            raise
        if error is not None:
            raise self._translate(error)
        images, seed = result.as_numpy("image"), result.as_numpy("seed_used")
        if images is None or seed is None or not len(seed):
            raise CheckFailed("the server answered without an image or a seed")
        return ImageResponse([bytes(image) for image in images], int(seed.flat[0]), time.perf_counter() - start)

    def _translate(self, error: InferenceServerException) -> Flux2Error:
        message = str(error.message()).removeprefix(f"in ensemble '{ENSEMBLE}', ")
        status = str(error.status()).removeprefix("StatusCode.")
        if status == "INVALID_ARGUMENT":
            return RequestError(message)
        if status == "UNAVAILABLE" and not self.ready():
            return UsageError(f"no FLUX.2 server answers at {self.url}; start one with: python -m serve run DEPLOY")
        return ServerError(f"{status}: {message}")
