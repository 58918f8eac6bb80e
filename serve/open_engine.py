"""Open what runs a part: a graph in ONNX Runtime, plans in TensorRT, packages in torch, as artifact or settings say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from kit.artifact import Manifest
from kit.engine_record import EngineRecord
from kit.errors import ArtifactError
from kit.ports import PartName
from serve.engine import Engine, OrtEngine
from serve.settings import Settings

RECORD = "engine.json"  # beside the plans of a python model: what they were built on


def open_parts(
    folder: Path, manifest: Manifest, parts: Sequence[PartName], threads: int = 0
) -> Mapping[PartName, Engine]:
    """Open parts of an artifact or of a deployment; those of an engine artifact share activation memory."""
    records = {part: manifest.part(part) for part in parts}
    if manifest.kind == "engine":
        from serve.tensorrt_engine import open_engines

        return open_engines(folder, EngineRecord.of(manifest), {part: records[part].ports for part in parts})
    if manifest.kind == "aoti":
        from serve.aoti import AotiEngine  # brings torch, which ONNX Runtime does without

        on_gpu = str(manifest.options["device"]).startswith("cuda")
        return {part: AotiEngine(folder, part, "graphs" if on_gpu else "calls") for part in parts}
    return {part: OrtEngine(folder / record.graph, record.ports, threads) for part, record in records.items()}


def open_model(version: Path, part: PartName, settings: Settings) -> Engine:
    """Open the part of a Triton python model, whose files stand in its version folder."""
    if part in settings.tensorrt:
        from serve.tensorrt_engine import open_engines

        return open_engines(version, read_record(version / RECORD), {part: settings.ports[part]})[part]
    below = version / part if part == "transformer" else version
    return OrtEngine(below / "model.onnx", settings.ports[part], settings.tuning.threads)


def write_record(path: Path, record: EngineRecord) -> None:
    path.write_text(json.dumps(record.options(), indent=1) + "\n")


def read_record(path: Path) -> EngineRecord:
    """Read the record beside plans; raises ArtifactError that names the file."""
    try:
        return EngineRecord.read(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); write the deployment again") from None
