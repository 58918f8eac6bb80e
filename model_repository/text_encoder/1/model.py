"""Triton model: run the text encoder in ONNX Runtime, several requests in one call."""

from __future__ import annotations

from serve.stage import EngineModel


class TritonPythonModel(EngineModel):
    """The text encoder."""

    part = "text_encoder"
