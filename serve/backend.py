"""Tensors and responses of Triton's python backend as arrays and errors; shared by the models of the repository.

`pb` is the module triton_python_backend_utils, which exists only inside the server.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from kit.dtypes import Dtype
from kit.engine import Array
from kit.errors import CancelledError, EngineError, Flux2Error, RequestError, UnavailableError, UsageError
from pipeline.request import FIELDS

logger = logging.getLogger(__name__)
NAMED = (RequestError, UnavailableError, CancelledError)
MOST_VALUES = 10_000  # of a field that is a list; `check` knows the narrower limit


def read_optional(pb: Any, request: Any, name: str, dtype: Dtype | None = None) -> Array | None:
    """Return an input as an array, or None if the request does not have it.

    `dtype` is required for bf16 inputs, which Triton exposes through DLPack only.
    """
    tensor = pb.get_input_tensor_by_name(request, name)
    if tensor is None:
        return None
    if dtype != "bf16":
        return np.asarray(tensor.as_numpy())
    from torch.utils import dlpack

    from kit.dtypes import to_array

    return to_array(dlpack.from_dlpack(tensor.to_dlpack()).cpu())


def read(pb: Any, request: Any, name: str, dtype: Dtype | None = None) -> Array:
    """Return an input as an array; raises RequestError if the request does not have it."""
    value = read_optional(pb, request, name, dtype)
    if value is None:
        raise RequestError(f"{name}: missing")
    return value


def read_fields(pb: Any, request: Any) -> dict[str, Any]:
    """Return the raw values of the ensemble's fields: one value each, or a list."""
    found: dict[str, Any] = {}
    for field in FIELDS:
        array = read_optional(pb, request, field.name)
        if array is not None and array.size > MOST_VALUES:
            raise RequestError(f"{field.name}: {array.size} values; the limit is {MOST_VALUES}")
        found[field.name] = None if array is None else array.reshape(-1).tolist() if field.many else array.flat[0]
    return found


def respond(pb: Any, outputs: Mapping[str, Array]) -> Any:
    """Make a response; text arrays must have dtype object."""
    return pb.InferenceResponse([_tensor(pb, name, value) for name, value in outputs.items()])


def _tensor(pb: Any, name: str, value: Array) -> Any:
    if value.dtype.name != "bfloat16":
        return pb.Tensor(name, np.ascontiguousarray(value))
    from kit.dtypes import to_tensor

    return pb.Tensor.from_dlpack(name, to_tensor(value).__dlpack__())


def send(pb: Any, sender: Any, response: Any) -> None:
    """Send the only response of a request."""
    sender.send(response, flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def pass_on(pb: Any, error: Exception) -> Any:
    """Make an error response of an internal model, with the name of the error for `passed_on`.

    Triton hands the message of an error to a model that calls another one, but not its code.
    """
    if isinstance(error, NAMED):
        return refuse(pb, type(error)(f"{type(error).__name__}: {error}"))
    return refuse(pb, error)  # an EngineError has its name anyway


def passed_on(message: str) -> Flux2Error:
    """Return the error that an internal model passed on; an EngineError if Triton itself failed."""
    message = re.sub(r"^in ensemble '\w+', ", "", message)
    name, _, text = message.partition(": ")
    for kind in (*NAMED, EngineError):
        if name == kind.__name__:
            return kind(text)
    return EngineError(message)


def refuse(pb: Any, error: Exception) -> Any:
    """Make an error response: the code that kit.errors names, INTERNAL and a log entry for everything else.

    The error applies to one request; the others of the batch continue.
    """
    for kind, code in ((UsageError, "INVALID_ARG"), (UnavailableError, "UNAVAILABLE"), (CancelledError, "CANCELLED")):
        if isinstance(error, kind):
            return pb.InferenceResponse(error=pb.TritonError(str(error), getattr(pb.TritonError, code)))
    logger.error("request failed", exc_info=error)
    return pb.InferenceResponse(error=pb.TritonError(f"{type(error).__name__}: {error}", pb.TritonError.INTERNAL))
