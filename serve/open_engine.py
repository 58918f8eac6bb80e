"""Which runtime runs an artifact: its kind says so, nobody has to choose."""

from __future__ import annotations

from pathlib import Path

from kit.artifact import Manifest
from kit.ports import PartName
from serve.engine import Engine, OrtEngine


def open_engine(folder: Path, manifest: Manifest, part: PartName, threads: int = 0) -> Engine:
    """Open one part of an artifact; raises ArtifactError when this machine cannot run it."""
    if manifest.kind == "aoti":
        from serve.aoti import AotiEngine  # brings torch, which ONNX Runtime does without

        on_gpu = str(manifest.options["device"]).startswith("cuda")
        return AotiEngine(folder, part, "graphs" if on_gpu else "calls")
    record = manifest.part(part)
    return OrtEngine(folder / record.graph, record.ports, threads)
