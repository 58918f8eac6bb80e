"""Triton model: check a request and tokenize its prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.engine import Array
from kit.errors import Flux2Error
from pipeline.prompts import PromptEncoder
from pipeline.request import check
from serve import backend
from serve.settings import Settings, version_folder
from serve.wire import TICKET, request_to_tensors


class TritonPythonModel:
    """The first step of the ensemble: an invalid request is rejected here, before any engine runs."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = version_folder(args)
        self.settings = Settings.read(folder)
        variant = self.settings.variant
        self.encoder = PromptEncoder(folder / "tokenizer", variant.text_encoder.kind, variant.text_tokens)

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            try:
                responses.append(backend.respond(pb, self._tokenize(request)))
            except Flux2Error as error:
                responses.append(backend.pass_on(pb, error))
        return responses

    def _tokenize(self, request: Any) -> dict[str, Array]:
        variant = self.settings.variant
        checked = check(backend.read_fields(pb, request), variant, self.settings.limits)
        tokens = self.encoder.encode(checked.prompt)
        ticket = backend.read_optional(pb, request, "ticket")
        outputs: dict[str, Array] = {
            "input_ids": tokens.input_ids[None],
            "attention_mask": tokens.attention_mask[None],
            **request_to_tensors(checked),
            TICKET.name: np.zeros((1, 1), np.int64) if ticket is None else ticket.reshape(1, 1),
        }
        if variant.guidance == "cfg":
            negative = self.encoder.encode(checked.negative_prompt, "negative_prompt")
            outputs["negative_input_ids"] = negative.input_ids[None]
            outputs["negative_attention_mask"] = negative.attention_mask[None]
        return outputs
