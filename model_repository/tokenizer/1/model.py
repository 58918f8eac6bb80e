"""Triton model: tokenize a prompt."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb

from kit.engine import Array
from kit.errors import Flux2Error
from pipeline.prompts import PromptEncoder
from pipeline.request import prompt_text
from serve import backend
from serve.settings import Settings, version_folder


class TritonPythonModel:
    """The first step of the prompt stage: a text that is too long is rejected here, before any engine runs."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = version_folder(args)
        variant = Settings.read(folder).variant
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
        field = str(backend.read(pb, request, "field").item().decode(errors="replace"))
        text = prompt_text(backend.read(pb, request, "text").item(), field, self.encoder.text_tokens)
        tokens = self.encoder.encode(text, field)
        return {"input_ids": tokens.input_ids[None], "attention_mask": tokens.attention_mask[None]}
