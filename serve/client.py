"""A small client on tritonclient's gRPC: request fields in, encoded images out."""

from __future__ import annotations

import base64
import queue
import re
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from kit.address import answers_http, grpc_address
from kit.errors import Flux2Error, RequestError, ServerError, UnavailableError, UsageError
from pipeline.request import FIELDS, Field, FieldType
from serve.wire import FRONT, NUMPY, STREAM

LOST = re.compile("Socket closed|Stream removed|Connection reset|recvmsg")  # gRPC's words for a connection that broke
CONTROL_SECONDS = 600.0  # engines of 32 B take minutes to load
CHANNEL = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 50),  # gRPC's own pauses, 1 to 120 s, outlast a restart of the server
    ("grpc.max_reconnect_backoff_ms", 500),
]


@dataclass(frozen=True)
class ImageResponse:
    """The response to one request: encoded images, the seed that was used, and the elapsed seconds."""

    images: list[bytes]
    seed: int
    seconds: float


def fields_to_inputs(fields: Mapping[str, Any]) -> list[Any]:
    """Convert fields to gRPC inputs of shape [1], or [N] for lists; fields that are None are omitted.

    Raises RequestError for an unknown field or a value of the wrong type.
    """
    known = {field.name: field for field in FIELDS}
    inputs = []
    for name, value in fields.items():
        if value is None:
            continue
        if name not in known:
            raise RequestError(f"unknown field {name!r}; there are: {', '.join(known)}")
        if known[name].is_image and not value and known[name].many:  # a tensor without values is refused by Triton
            continue
        array = _array(known[name], value)
        tensor = grpc.InferInput(name, array.shape, _datatype(known[name].type))
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    return inputs


def _array(field: Field, value: Any) -> Any:
    if field.type == "TYPE_STRING":
        if field.many and not isinstance(value, (list, tuple)):
            raise RequestError(f"{field.name}: expected a list of encoded images, each as bytes")
        items = list(value) if field.many else [value]
        if field.is_image and not all(isinstance(item, bytes) for item in items):
            raise RequestError(f"{field.name}: expected encoded images as bytes, such as those of Path.read_bytes")
        return np.array([item.encode() if isinstance(item, str) else item for item in items], np.object_)
    kind = NUMPY[field.type]
    if field.many:
        try:
            return np.array([float(number) for number in value], kind)
        except (TypeError, ValueError):
            raise RequestError(f"{field.name}: {value!r} is not a list of {_datatype(field.type)} values") from None
    try:
        number = np.array([value])
        fits = kind is np.float32 or (np.iinfo(kind).min <= int(value) <= np.iinfo(kind).max and int(value) == value)
        if fits and number.dtype.kind in "iuf":
            return number.astype(kind)
    except (TypeError, ValueError, OverflowError):
        pass  # rejected below, like any other value that does not fit
    raise RequestError(f"{field.name}: {value!r} is not a {_datatype(field.type)} value")


def _datatype(kind: FieldType) -> str:
    """Return the name that Triton's protocol uses for a type of config.pbtxt."""
    return "BYTES" if kind == "TYPE_STRING" else kind.removeprefix("TYPE_")


@dataclass(frozen=True)
class Progress:
    """How far a request is: completed steps of all, and a small PNG of the image so far if the server has one."""

    step: int
    steps: int
    preview: bytes | None = None


class Client:
    """Requests images from one server; thread-safe."""

    SECRET = "flux2-admin"  # the header of requests that only the supervisor may send

    def __init__(self, url: str) -> None:
        self.url = grpc_address(url)
        self._grpc = grpc.InferenceServerClient(self.url, channel_args=CHANNEL)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._grpc.close()

    def ready(self) -> bool:
        """Return whether the server responds and reports that all its models are loaded."""
        try:
            return bool(self._grpc.is_server_ready() and self._grpc.is_model_ready(FRONT))
        except InferenceServerException:
            return False

    def responds(self) -> bool:
        """Return whether a server answers at all, ready or not."""
        try:
            return bool(self._grpc.is_server_live())
        except InferenceServerException:
            return False

    def control(self, action: Literal["load", "unload"], model: str, secret: str) -> None:
        """Load or unload a model; raises ServerError if the server refuses or does not answer."""
        call = self._grpc.load_model if action == "load" else self._grpc.unload_model
        try:
            call(model, headers={f"triton-grpc-protocol-{self.SECRET}": secret}, client_timeout=CONTROL_SECONDS)
        except InferenceServerException as error:
            raise ServerError(f"{action} {model}: {error.message()}") from None

    def generate(
        self,
        fields: Mapping[str, Any],
        timeout: float | None = None,
        tick: Callable[[float], None] | None = None,
        cache: Literal["use", "skip"] = "use",
    ) -> ImageResponse:
        """Send one request and wait; `tick` is called about ten times a second with the elapsed seconds.

        The fields may hold `images`, a list of encoded references, and a `mask`, both as bytes. With `cache` "skip" the
        server computes everything again.

        Raises RequestError if the server rejects the request, UnavailableError if it can be sent again later, and
        ServerError for every other failure. An interrupt cancels the call, and the server stops working on it.
        """
        answers: queue.SimpleQueue[tuple[Any, InferenceServerException | None]] = queue.SimpleQueue()
        start = time.perf_counter()
        call = self._grpc.async_infer(
            FRONT,
            fields_to_inputs(fields),
            callback=lambda result, error: answers.put((result, error)),
            client_timeout=timeout,
            timeout=None if timeout is None else round(timeout * 1e6),  # the server's deadline, in microseconds
            **({} if cache == "use" else {"parameters": {"cache": cache}}),
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
            raise self._translate(error, timeout)
        return self._response(result, fields, time.perf_counter() - start)

    def stream(
        self,
        fields: Mapping[str, Any],
        timeout: float | None = None,
        tick: Callable[[float], None] | None = None,
    ) -> Generator[Progress | ImageResponse, None, None]:
        """Send one request and yield its progress after steps, then its images; arguments and errors as `generate`.

        A step may be left out if others follow at once. Closing the iterator cancels the request.
        """
        answers: queue.SimpleQueue[tuple[Any, InferenceServerException | None]] = queue.SimpleQueue()
        start = time.perf_counter()
        inputs = fields_to_inputs(fields)
        with grpc.InferenceServerClient(self.url, channel_args=CHANNEL) as streaming:  # a client has at most one stream
            streaming.start_stream(
                lambda result, error: answers.put((result, error)),
                stream_timeout=timeout,
                headers={"triton_grpc_error": "true"},  # errors have their status
            )
            ended = False
            try:
                limit = None if timeout is None else round(timeout * 1e6)
                streaming.async_stream_infer(STREAM, inputs, timeout=limit)
                while not ended:
                    try:
                        result, error = answers.get(timeout=0.1)
                    except queue.Empty:
                        if tick is not None:
                            tick(time.perf_counter() - start)
                        continue
                    if error is not None:
                        ended = True
                        raise self._translate(error, timeout)
                    if (step := result.as_numpy("step")) is None:
                        ended = True
                        yield self._response(result, fields, time.perf_counter() - start)
                    else:
                        preview = result.as_numpy("preview")
                        image = None if preview is None else self._decoded(preview, fields)[0]
                        yield Progress(int(step[0]), int(result.as_numpy("steps")[0]), image)
            finally:
                streaming.stop_stream(cancel_requests=not ended)

    def _response(self, result: Any, fields: Mapping[str, Any], seconds: float) -> ImageResponse:
        images, seed = result.as_numpy("image"), result.as_numpy("seed_used")
        if images is None or seed is None or not len(seed):
            raise ServerError("the server's response has no image or no seed")
        return ImageResponse(self._decoded(images, fields), int(seed.flat[0]), seconds)

    @staticmethod
    def _decoded(images: Any, fields: Mapping[str, Any]) -> list[bytes]:
        encoded = [bytes(image) for image in images]
        return [base64.b64decode(x) for x in encoded] if fields.get("response_encoding") == "base64" else encoded

    def _translate(self, error: InferenceServerException, timeout: float | None = None) -> Flux2Error:
        message = str(error.message())
        status = str(error.status()).removeprefix("StatusCode.")
        if status == "INVALID_ARGUMENT":
            return RequestError(message)
        if status == "DEADLINE_EXCEEDED":
            limit = f" within {timeout:g} s" if timeout is not None else " in time"
            return ServerError(f"the server at {self.url} did not answer{limit}; the request was cancelled")
        if status == "CANCELLED":
            return ServerError(f"the request was cancelled by the server at {self.url}")
        if status == "UNAVAILABLE" and self.responds():
            return UnavailableError(message)
        if status == "UNAVAILABLE" and LOST.search(message):
            return ServerError(f"the server at {self.url} ended during the request; send it again when it is back")
        if status == "UNAVAILABLE":
            if answers_http(self.url):
                return UsageError(f"{self.url} is the HTTP port of a server; give its gRPC port, 8001 by default")
            return ServerError(f"no FLUX.2 server responds at {self.url}; start one with: python -m serve run DEPLOY")
        return ServerError(f"{status}: {message}")
