"""Triton model: check a request, and turn its prompts into token ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as pb

from kit.engine import Array
from kit.errors import Flux2Error
from pipeline.prompts import PromptEncoder
from pipeline.request import check
from serve import wire
from serve.settings import Settings, version_folder


class TritonPythonModel:
    """The ensemble's first step: a wrong request ends here, before it costs anything."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = version_folder(args)
        self.settings = Settings.read(folder)
        variant = self.settings.variant
        self.encoder = PromptEncoder(folder / "tokenizer", variant.text_encoder.kind, variant.text_tokens)

    def execute(self, requests: list[Any]) -> list[Any]:
        responses = []
        for request in requests:
            try:
                outputs = self._tokenize(request)
                responses.append(wire.answer(pb, outputs))
            except Flux2Error as error:
                responses.append(wire.refuse(pb, error))
        return responses

    def _tokenize(self, request: Any) -> dict[str, Array]:
        variant = self.settings.variant
        checked = check(wire.read_fields(pb, request), variant, self.settings.limits)
        tokens = self.encoder.encode(checked.prompt)
        outputs: dict[str, Array] = {
            "input_ids": tokens.input_ids[None],
            "attention_mask": tokens.attention_mask[None],
            "checked_seed": np.array([[checked.seed]], np.int64),
            "checked_size": np.array([[checked.width, checked.height]], np.int32),
            "checked_steps": np.array([[checked.steps]], np.int32),
            "checked_guidance": np.array([[checked.guidance]], np.float32),
            "checked_num_images": np.array([[checked.num_images]], np.int32),
            "checked_format": np.array([checked.output_format.encode()], np.object_),
        }
        if variant.guidance == "cfg":
            negative = self.encoder.encode(checked.negative_prompt, "negative_prompt")
            outputs["negative_input_ids"] = negative.input_ids[None]
            outputs["negative_attention_mask"] = negative.attention_mask[None]
        return outputs
