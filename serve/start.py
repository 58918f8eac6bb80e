"""Start an admitted request: bring to the denoiser what it lacks of prompts, references and mask, then the request.

Each prompt goes through the ensemble `prompt_stage`, each image through `vae_encoder`; what the denoiser's store has
from other requests is left out, and what several requests need at the same time is computed by one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kit.engine import Array
from kit.errors import CancelledError
from pipeline import pictures
from pipeline.references import whole_tokens
from pipeline.request import Request
from pipeline.store_keys import Role, image_key, memory_key, prompt_key
from serve.flights import Flights
from serve.ledger import Ledger
from serve.settings import Settings
from serve.wire import (
    ACTION,
    DENOISED,
    DENOISER,
    KEYS,
    LATENTS,
    MASK,
    MASK_KEY,
    PROMPT_STAGE,
    TICKET,
    VAE_ENCODER,
    Action,
    request_to_tensors,
)


class Call(Protocol):
    """Calls a model of the deployment and returns its outputs; raises Flux2Error."""

    def __call__(self, model: str, outputs: list[str], inputs: Mapping[str, Array]) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Prompt:
    """A text to embed."""

    key: str
    field: str
    text: str


@dataclass(frozen=True)
class Picture:
    """An image to encode."""

    key: str
    field: str
    image: bytes
    role: Role


@dataclass(frozen=True)
class Items:
    """What a request needs in the denoiser, by keys; `memory` is the key of klein-kv's keys and values."""

    prompts: tuple[Prompt, ...]
    pictures: tuple[Picture, ...]
    memory: tuple[str, ...] = ()

    @property
    def keys(self) -> list[str]:
        return [*self.memory, *(text.key for text in self.prompts), *(picture.key for picture in self.pictures)]


def items_of(request: Request, settings: Settings) -> Items:
    """List what a request needs."""
    texts = [("prompt", request.prompt)]
    if settings.variant.guidance == "cfg":
        texts.append(("negative_prompt", request.negative_prompt))
    found = []
    for i, image in enumerate(request.images):
        field, role = f"images[{i}]", _role(request, i)
        size = whole_tokens(*pictures.read_size(image, field))
        found.append(Picture(image_key(settings.checkpoint, image, size, role), field, image, role))
    memory: tuple[str, ...] = ()
    if found and settings.variant.family == "klein-kv":
        memory = (memory_key(settings.checkpoint, [picture.key for picture in found]),)
    return Items(
        tuple(Prompt(prompt_key(settings.checkpoint, text), field, text) for field, text in texts), tuple(found), memory
    )


def _role(request: Request, index: int) -> Role:
    return "base" if request.mask is not None and index == 0 else "reference"


class Starter:
    """Starts the requests of one front model."""

    def __init__(self, settings: Settings, ledger: Ledger) -> None:
        self.settings = settings
        self.ledger = ledger
        self._flights = Flights()

    def start(self, request: Request, ticket: int, call: Call, cache: bool = True) -> None:
        """Start a request; without `cache`, nothing is taken from the store. Raises Flux2Error."""
        steps = _Steps(ticket, call)
        items = items_of(request, self.settings)
        cache = cache and self.settings.tuning.cache_bytes > 0
        missing = steps.find(items.keys) if cache else set(items.keys)
        mine = self._flights.alone(missing, lambda: self.ledger.is_wanted(ticket)) if cache else nullcontext(False)
        with mine as waited:
            if waited:
                missing = steps.find(items.keys, again=True)
            for picture in items.pictures:
                if picture.key in missing:
                    self._check_wanted(ticket)
                    steps.bring_picture(picture)
                    missing.discard(picture.key)  # it may be among the references twice
            if request.mask is not None:
                self._check_wanted(ticket)
                steps.bring_mask(request.mask, request.width, request.height)
            for prompt in items.prompts:
                if prompt.key in missing:
                    self._check_wanted(ticket)
                    steps.bring_prompt(prompt)
                    missing.discard(prompt.key)
        memory = items.memory if cache else ()
        steps.start(request, [*items.keys[len(items.memory) :], *memory])

    def _check_wanted(self, ticket: int) -> None:
        if not self.ledger.is_wanted(ticket):
            raise CancelledError("the request was given up")


@dataclass(frozen=True)
class _Steps:
    """The calls of one request to other models."""

    ticket: int
    call: Call

    def find(self, keys: Sequence[str], again: bool = False) -> set[str]:
        """Return the keys of what the denoiser's store lacks."""
        unique = list(dict.fromkeys(keys))
        outputs = self.call(DENOISER, ["missing"], self._inputs("find again" if again else "find", unique))
        return {key for key, missing in zip(unique, outputs["missing"].flat, strict=True) if missing}

    def bring_prompt(self, prompt: Prompt) -> None:
        texts = {"text": _text(prompt.text.encode()), "field": _text(prompt.field.encode())}
        self.call(PROMPT_STAGE, ["started"], {**texts, **self._inputs("bring", [prompt.key])})

    def bring_picture(self, picture: Picture) -> None:
        encoded = self._encode(picture.image, picture.field, picture.role)
        self._bring(picture.key, LATENTS, encoded["latents"])

    def bring_mask(self, mask: bytes, width: int, height: int) -> None:
        self._bring(MASK_KEY, MASK, self._encode(mask, "mask", "mask", (width, height))["mask"])

    def start(self, request: Request, keys: Sequence[str]) -> None:
        tensors = request_to_tensors(request)
        checked = {tensor.name: tensors[tensor.name] for tensor in DENOISED}
        self.call(DENOISER, ["started"], {**checked, **self._inputs("start", keys)})

    def _encode(self, image: bytes, field: str, role: str, size: tuple[int, int] = (0, 0)) -> Mapping[str, Any]:
        inputs = {
            "image": _text(image),
            "field": _text(field.encode()),
            "role": _text(role.encode()),
            "size": np.array(size, np.int32),
            "ticket": np.array([self.ticket], np.int64),
        }
        return self.call(VAE_ENCODER, ["mask" if role == "mask" else "latents"], inputs)

    def _bring(self, key: str, name: str, array: Array) -> None:
        self.call(DENOISER, ["started"], {name: array[None], **self._inputs("bring", [key])})

    def _inputs(self, action: Action, keys: Sequence[str]) -> dict[str, Array]:
        return {
            ACTION: _text(action.encode())[None],
            KEYS: np.array([[key.encode() for key in keys]], np.object_),
            TICKET.name: np.array([[self.ticket]], np.int64),
        }


def _text(value: bytes) -> Array:
    return np.array([value], np.object_)
