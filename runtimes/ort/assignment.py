"""Which provider runs which node, as the session itself reports it; what falls back to the CPU is named.

Computing shapes on the CPU is meant: CUDA's provider puts it there, because results of a few integers are needed there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kit.errors import ArtifactError

CPU = "CPUExecutionProvider"
RECORD = "session.record_ep_graph_assignment_info"  # option of a session; without it there is no report
SMALL = 64  # values of a constant that takes part in computing shapes
SOURCES = ("Shape", "Size")
LARGE = ("ConstantOfShape", "Expand", "Range", "Tile", "EyeLike")  # make tensors of any size out of a shape


@dataclass(frozen=True)
class Assignment:
    """The nodes of a graph by the provider that runs them."""

    nodes: Mapping[str, int]  # ONNX Runtime's name of a provider -> how many
    on_cpu: tuple[str, ...]  # "name (operator)" of nodes on the CPU that do not compute shapes

    def require_gpu(self, graph: Path, title: str) -> None:
        """Raise ArtifactError that names nodes if the CPU runs more than shapes."""
        if self.on_cpu:
            some = ", ".join(self.on_cpu[:5]) + (", ..." if len(self.on_cpu) > 5 else "")
            raise ArtifactError(
                f"{graph}: {title} cannot run {len(self.on_cpu)} of {sum(self.nodes.values())} nodes, the CPU would: "
                f"{some}; choose another recipe or runtime"
            )


def assignment(session: Any, graph: Path) -> Assignment:
    """Read the assignment of a session that was opened with `RECORD`."""
    counts: Counter[str] = Counter()
    on_cpu: list[tuple[str, str]] = []
    for part in session.get_provider_graph_assignment_info():
        nodes = part.get_nodes()
        counts[part.ep_name] += len(nodes)
        if part.ep_name == CPU:
            on_cpu += [(node.name, node.op_type) for node in nodes]
    excused = shape_nodes(ir.load(graph)) if on_cpu else set()
    return Assignment(dict(counts), tuple(f"{name} ({op})" for name, op in on_cpu if name not in excused))


def shape_nodes(model: ir.Model) -> set[str]:
    """Return the names of nodes that compute shapes: from shapes of tensors and small constants alone."""
    small: set[int] = set()  # ids of values
    found: set[str] = set()
    for node in model.graph:
        given = [value for value in node.inputs if value is not None]
        computes = node.op_type not in LARGE and all(id(value) in small or _is_small(value) for value in given)
        if node.op_type in SOURCES or computes:
            small |= {id(output) for output in node.outputs}
            found.add(node.name or "")
    return found


def _is_small(value: ir.Value) -> bool:
    if not value.is_initializer() or value.shape is None:
        return False
    count = 1
    for size in value.shape:
        if not isinstance(size, int):
            return False
        count *= size
    return count <= SMALL
