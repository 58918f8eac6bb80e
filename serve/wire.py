"""A checked Request as tensors and back: what travels between the models of a deployment, as one table.

The inputs of the denoiser and of the image encoder and their config.pbtxt are derived from it. Prompts, images and the
mask are not in it: they travel one by one, and reach the denoiser as embeddings, latents and mask of tokens, each under
a key by which the request names them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from kit.engine import Array
from pipeline.edit_fields import shortest
from pipeline.request import FieldType, Request

FRONT = "flux2"  # the model that clients call
STREAM = "flux2_stream"  # the same with progress
PROMPT_STAGE = "prompt_stage"  # the ensemble that brings a prompt: tokenizer, text encoder, denoiser
IMAGE_STAGE = "image_stage"  # the ensemble that ends it: VAE decoder, image encoder
DENOISER = "denoiser"
VAE_ENCODER = "vae_encoder"  # images and masks to what the denoiser takes; in deployments that take references
NUMPY: Mapping[FieldType, Any] = {
    "TYPE_STRING": np.object_,  # Triton's BYTES
    "TYPE_INT32": np.int32,
    "TYPE_INT64": np.int64,
    "TYPE_FP32": np.float32,
}


@dataclass(frozen=True)
class RequestTensor:
    """One tensor: the request fields it holds, in order, and whether it has a batch axis in front of them.

    A tensor with `many` holds one field that is a list of any length; an empty one is sent as a single 0, because a
    tensor without values would not reach a model.
    """

    name: str
    type: FieldType
    fields: tuple[str, ...]
    batched: bool = True
    many: bool = False

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape without a batch axis."""
        return (-1,) if self.many else (len(self.fields),)

    def pack(self, request: Request) -> Array:
        """Return the tensor of one request, [1, fields] or [fields]."""
        values = [getattr(request, field) for field in self.fields]
        if self.many:
            values = list(values[0]) or [0]
        raw = [value.encode() if isinstance(value, str) else value for value in values]
        array: Array = np.array(raw, NUMPY[self.type])
        return array[None] if self.batched else array

    def unpack(self, array: Array) -> dict[str, Any]:
        """Return the fields of one request as plain Python values."""
        flat = array.reshape(-1)
        values = [shortest(value) for value in flat] if self.type == "TYPE_FP32" else flat.tolist()
        if self.many:
            return {self.fields[0]: () if values == [0] else tuple(values)}
        texts = [value.decode() if isinstance(value, bytes) else value for value in values]
        return dict(zip(self.fields, texts, strict=True))


SEED = RequestTensor("checked_seed", "TYPE_INT64", ("seed",))
FORMAT = RequestTensor("checked_format", "TYPE_STRING", ("output_format",), batched=False)
ENCODING = RequestTensor("checked_encoding", "TYPE_STRING", ("response_encoding",), batched=False)
TENSORS = (
    SEED,
    RequestTensor("checked_size", "TYPE_INT32", ("width", "height")),
    RequestTensor("checked_steps", "TYPE_INT32", ("steps",)),
    RequestTensor("checked_guidance", "TYPE_FP32", ("guidance",)),
    RequestTensor("checked_num_images", "TYPE_INT32", ("num_images",)),
    RequestTensor("checked_strength", "TYPE_FP32", ("strength",)),
    RequestTensor("checked_sigmas", "TYPE_FP32", ("sigmas",), many=True),
    FORMAT,
    ENCODING,
)
TICKET = RequestTensor("checked_ticket", "TYPE_INT64", ("ticket",))  # of the front model
ACTION, KEYS, MASK, LATENTS = "action", "item_keys", "item_mask", "item_latents"  # further inputs of the denoiser
MASK_KEY = "mask:"  # the key of a request's own mask, which no other request shares
Action = Literal["find", "find again", "bring", "start", "fetch"]
DENOISED = tuple(tensor for tensor in TENSORS if tensor.batched)  # the denoiser's inputs
IMAGE_ENCODED = (FORMAT, ENCODING, SEED)  # the image encoder's inputs; the seed passes through


def request_to_tensors(request: Request) -> dict[str, Array]:
    """Return all tensors of a request by name."""
    return {tensor.name: tensor.pack(request) for tensor in TENSORS}


def request_from_tensors(tensors: Mapping[str, Array]) -> Request:
    """Rebuild a request from the denoiser's tensors; without FORMAT the format is png. Prompts and images are empty."""
    fields: dict[str, Any] = {"prompt": "", "negative_prompt": "", "output_format": "png"}
    for tensor in TENSORS:
        if tensor.name in tensors:
            fields |= tensor.unpack(tensors[tensor.name])
    return Request(**fields)
