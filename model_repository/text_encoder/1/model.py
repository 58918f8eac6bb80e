"""Triton model: the text encoder as a python model, several requests in one engine call."""

from __future__ import annotations

from serve.stage import EngineModel


class TritonPythonModel(EngineModel):
    """The text encoder."""

    part = "text_encoder"
