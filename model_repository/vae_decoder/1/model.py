"""Triton model: run the VAE decoder in ONNX Runtime, several requests in one call."""

from __future__ import annotations

from serve.stage import EngineModel


class TritonPythonModel(EngineModel):
    """The VAE decoder."""

    part = "vae_decoder"
