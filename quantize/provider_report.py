"""Report which nodes of a part a provider of ONNX Runtime runs, and which it leaves to others."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kit.artifact import Manifest
from kit.ports import PartName
from kit.providers import Provider
from runtimes.ort.assignment import Assignment, assignment
from runtimes.ort.bound import open_session
from runtimes.ort.providers import Plan, merged
from runtimes.trt.profiles import Sizing, derive


def report_assignment(folder: Path, manifest: Manifest, part: PartName, row: Provider) -> Assignment:
    """Open a part with a provider and read who runs what.

    Raises UsageError if the provider cannot be loaded here, and ArtifactError if it rejects the graph.
    """
    record = manifest.part(part)
    with tempfile.TemporaryDirectory() as cache:
        plan = Plan(merged(derive(record.ports, Sizing())), Path(cache), graphs=False)
        session = open_session(folder / record.graph, record.ports, row, plan)
        return assignment(session, folder / record.graph)
