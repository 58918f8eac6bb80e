"""Run several requests through one part in as few engine calls as their shapes allow, inside or outside Triton."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from kit.engine import Array, Engine
from kit.errors import EngineError
from kit.ports import PartName
from runtimes.aoti import record as aoti_record
from runtimes.aoti.record import INDEX
from runtimes.open import OPEN_GRAPH, open_plans
from runtimes.trt.record import RECORD, read_record
from serve import backend, ort_deploy
from serve.settings import Settings, version_folder

logger = logging.getLogger(__name__)
ENGINE_NICENESS = 5  # a CPU engine gives way to the models that admit, reject and encode
Result = dict[str, Array] | EngineError


class EngineModel:
    """A Triton python model that runs one part; used where Triton's own TensorRT backend cannot."""

    part: ClassVar[PartName]

    def initialize(self, args: dict[str, str]) -> None:
        import triton_python_backend_utils as pb  # exists only inside the server

        self.pb = pb
        folder = version_folder(args)
        settings = Settings.read(folder)
        self.engine = open_model(folder, self.part, settings)

    def execute(self, requests: list[Any]) -> list[Any]:
        ports = self.engine.ports.inputs
        inputs = [{p.name: backend.read(self.pb, request, p.name, p.dtype) for p in ports} for request in requests]
        return [self._respond(result) for result in run_together(self.engine, inputs)]

    def _respond(self, result: Result) -> Any:
        if isinstance(result, EngineError):
            return backend.pass_on(self.pb, result)
        return backend.respond(self.pb, result)


def open_model(version: Path, part: PartName, settings: Settings) -> Engine:
    """Open the part of a Triton python model; its files are in the model's version folder."""
    return open_models(version, [part], settings)[part]


def open_models(version: Path, parts: Sequence[PartName], settings: Settings) -> Mapping[PartName, Engine]:
    """Open the parts of one Triton python model; plans share activation memory, so that one runs at a time."""
    if parts[0] in settings.tensorrt:
        ports = {part: settings.ports[part] for part in parts}
        return open_plans(version, read_record(version / RECORD), ports)
    if not settings.gpu:
        os.nice(ENGINE_NICENESS)
    return {part: _open(version, part, settings) for part in parts}


def _open(version: Path, part: PartName, settings: Settings) -> Engine:
    if settings.runtime == "aoti":
        from runtimes.aoti.engine import AotiEngine

        return AotiEngine(
            version / part / INDEX, settings.ports[part], aoti_record.read_record(version / aoti_record.RECORD)
        )
    graph = version / "model.onnx"
    if part.startswith("transformer"):  # klein-kv has three graphs with the same weights
        graph = version / "transformer" / f"model{part.removeprefix('transformer')}.onnx"
    if settings.gpu:
        return ort_deploy.open_part(graph, part, settings)
    open_graph = next(engine for runtime, engine in OPEN_GRAPH.items() if runtime == settings.runtime)
    return open_graph(graph, settings.ports[part], settings.tuning.threads)


def run_together(engine: Engine, requests: Sequence[Mapping[str, Array]]) -> list[Result]:
    """Run the requests whose arrays have equal shapes beyond the batch axis in one call; return each one's own rows.

    A call that fails is tried again with each half of its requests, so that only those that cannot run get an
    EngineError.
    """
    groups: dict[tuple[tuple[int, ...], ...], list[int]] = {}
    for index, request in enumerate(requests):
        key = tuple(request[port.name].shape[1:] for port in engine.ports.inputs)
        groups.setdefault(key, []).append(index)
    results: dict[int, Result] = {}
    for members in groups.values():
        results |= zip(members, _run_group(engine, [requests[i] for i in members]), strict=True)
    return [results[index] for index in range(len(requests))]


def _run_group(engine: Engine, requests: Sequence[Mapping[str, Array]]) -> list[Result]:
    names = [port.name for port in engine.ports.inputs]
    try:
        outputs = engine.run({name: np.concatenate([request[name] for request in requests]) for name in names})
    except EngineError as error:
        if len(requests) == 1:
            return [error]
        logger.warning("an engine call with %d requests failed, retrying with half: %s", len(requests), error)
        half = len(requests) // 2
        return _run_group(engine, requests[:half]) + _run_group(engine, requests[half:])
    results: list[Result] = []
    start = 0
    for request in requests:
        stop = start + len(request[names[0]])
        results.append({name: value[start:stop] for name, value in outputs.items()})
        start = stop
    return results
