"""Triton model: run the VAE decoder in ONNX Runtime, several requests in one call."""

from __future__ import annotations

from typing import Any

import triton_python_backend_utils as pb

from serve import triton_io
from serve.engine import EngineError, OrtEngine
from serve.settings import Settings, version_folder
from serve.stage import run_together


class TritonPythonModel:
    """Used where the server has no TensorRT backend."""

    def initialize(self, args: dict[str, str]) -> None:
        folder = version_folder(args)
        settings = Settings.read(folder)
        self.engine = OrtEngine(folder / "model.onnx", settings.ports["vae_decoder"], settings.tuning.threads)

    def execute(self, requests: list[Any]) -> list[Any]:
        names = [port.name for port in self.engine.ports.inputs]
        inputs = [{name: triton_io.read(pb, request, name) for name in names} for request in requests]
        try:
            results = run_together(self.engine, inputs)
        except EngineError as error:
            return [triton_io.refuse(pb, error) for _ in requests]
        return [triton_io.answer(pb, result) for result in results]
