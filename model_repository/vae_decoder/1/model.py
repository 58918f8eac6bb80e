"""Triton model: the VAE decoder as a python model, several requests in one engine call."""

from __future__ import annotations

from serve.stage import EngineModel


class TritonPythonModel(EngineModel):
    """The VAE decoder."""

    part = "vae_decoder"
