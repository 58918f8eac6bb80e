"""Rooms import downward only, and no file imports itself by a detour: see docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RULE = "kit < planner < runtimes < pipeline, export < quantize, serve < model_repository, benchmarks"
FLOORS = [set(rooms.split(", ")) for rooms in RULE.split(" < ")]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules(root: Path) -> dict[str, Path]:
    """Return every module of the rooms by its dotted name."""
    files = [file for room in FLOOR for file in (root / room).rglob("*.py")]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(name: str, file: Path, known: set[str]) -> Iterator[str]:
    """Yield the modules of the rooms that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
            head = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*head, *([node.module] if node.module else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
            yield from {target if target in known else base for target in targets} & known


def breaches(root: Path) -> list[str]:
    """Say which imports run upward or sideways, and which modules form a circle."""
    files = modules(root)
    graph = {name: set(imported(name, file, set(files))) - {name} for name, file in files.items()}
    wrong = []
    for name, targets in graph.items():
        room = name.split(".")[0]
        others = {target for target in targets if target.split(".")[0] != room}
        wrong += [f"{name} -> {t}" for t in sorted(others) if FLOOR[t.split(".")[0]] >= FLOOR[room]]
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        wrong.append(f"circle: {' -> '.join(error.args[1])}")
    return wrong


def test_rooms_import_downward_only_and_without_circles() -> None:
    assert breaches(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("kit/gpus.py", "from serve.launch import Server", "kit.gpus -> serve.launch"),
        ("quantize/scales.py", "import serve.wire", "quantize.scales -> serve.wire"),
        ("pipeline/noise.py", "from export import artifact", "pipeline.noise -> export.artifact"),
        ("kit/errors.py", "def late():\n    from kit import cli", "circle: kit."),
    ],
)
def test_one_import_turned_upward_is_noticed(tmp_path: Path, file: str, line: str, expected: str) -> None:
    for room in FLOOR:
        for source in (ROOT / room).rglob("*.py"):
            copy = tmp_path / source.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(source.read_text())
    with (tmp_path / file).open("a") as stream:
        stream.write(f"\n{line}\n")
    assert any(expected in breach for breach in breaches(tmp_path))
