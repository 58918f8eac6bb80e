"""Run several requests through one part in as few engine calls as their shapes allow, inside Triton or not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kit.engine import Array, Engine
from kit.errors import EngineError
from kit.ports import PartName
from runtimes.ort.engine import OrtEngine
from runtimes.trt.record import RECORD, read_record
from serve import backend
from serve.settings import Settings, version_folder


class EngineModel:
    """A Triton python model that runs one part; used where the server's own TensorRT backend cannot."""

    part: ClassVar[PartName]

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb  # exists inside the server only

        self.pb = pb
        folder = version_folder(args)
        settings = Settings.read(folder)
        self.engine = open_model(folder, self.part, settings)

    def execute(self, requests: list[Any]) -> list[Any]:
        ports = self.engine.ports.inputs
        inputs = [{p.name: backend.read(self.pb, request, p.name, p.dtype) for p in ports} for request in requests]
        try:
            results = run_together(self.engine, inputs)
        except EngineError as error:
            return [backend.refuse(self.pb, error) for _ in requests]
        return [backend.respond(self.pb, result) for result in results]


def open_model(version: Path, part: PartName, settings: Settings) -> Engine:
    """Open the part of a Triton python model, whose files stand in its version folder."""
    if part in settings.tensorrt:
        from runtimes.trt.engine import open_engines

        return open_engines(version, read_record(version / RECORD), {part: settings.ports[part]})[part]
    below = version / part if part == "transformer" else version
    return OrtEngine(below / "model.onnx", settings.ports[part], settings.tuning.threads)


def run_together(engine: Engine, requests: Sequence[Mapping[str, Array]]) -> list[dict[str, Array]]:
    """Stack the rows of requests whose arrays have equal shapes beyond the batch axis; return each one's own rows."""
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, request in enumerate(requests):
        key = tuple(request[port.name].shape[1:] for port in engine.ports.inputs)
        groups.setdefault(key, []).append(index)
    results: list[dict[str, Array]] = [{} for _ in requests]
    for members in groups.values():
        names = [port.name for port in engine.ports.inputs]
        outputs = engine.run({name: np.concatenate([requests[i][name] for i in members]) for name in names})
        start = 0
        for i in members:
            stop = start + len(requests[i][names[0]])
            results[i] = {name: value[start:stop] for name, value in outputs.items()}
            start = stop
    return results
