"""Load the kit's TensorRT modules against a stand-in, also with one name misspelled, to see whether that is noticed."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import pytest

from tests.runtimes.bindings.real import ROOT, interface
from tests.runtimes.bindings.strict import StrictModule

BUILDER = (
    "runtimes.trt.external_weights",
    "runtimes.trt.log",
    "runtimes.trt.build.progress",
    "runtimes.trt.build.network",
    "runtimes.trt.build.timing",
    "runtimes.trt.build.build",
)
ORDINARY = {"__init__", "append", "file", "path"}  # names of the bindings that the kit has for things of its own
RUNTIME = ("runtimes.trt.rtx", "runtimes.trt.plans", "runtimes.trt.engine")


@contextmanager
def using(trt: StrictModule, sources: Mapping[str, str] | None = None) -> Iterator[None]:
    """Let `import tensorrt` give the stand-in and load the kit's modules on it; `sources` replaces texts of some."""
    names = ("tensorrt", *BUILDER, *RUNTIME)
    kept = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    sys.modules["tensorrt"] = trt
    try:
        for name in names[1:]:  # each stands only on those before it
            text = (sources or {}).get(name) or source(name)
            made = ModuleType(name)
            sys.modules[name] = made
            exec(_compiled(name, text), made.__dict__)
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


def module(name: str) -> Any:
    """Import a module of the kit; inside `using` it stands on the stand-in."""
    return importlib.import_module(name)


@cache
def source(name: str) -> str:
    return (ROOT / f"{name.replace('.', '/')}.py").read_text()


@lru_cache(maxsize=32)
def _compiled(name: str, text: str) -> CodeType:
    return compile(text, f"{name.replace('.', '/')}.py", "exec")


def resolve_annotations(name: str) -> None:
    """Evaluate every annotation of a module, which nothing else does at run time; raises for a name that is not."""
    loaded = module(name)
    for value in vars(loaded).values():
        if not isinstance(value, type | FunctionType) or value.__module__ != name:
            continue
        for owner in (value, *(vars(value).values() if isinstance(value, type) else ())):
            owner = owner.fget if isinstance(owner, property) else owner
            if isinstance(owner, type | FunctionType):
                hints = vars(owner) if isinstance(owner, type) else {"__annotations__": owner.__annotations__}
                for annotation in hints.get("__annotations__", {}).values():
                    eval(str(annotation), vars(loaded))
    for annotation in vars(loaded).get("__annotations__", {}).values():
        eval(str(annotation), vars(loaded))


def misspellings(text: str, names: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (what, changed text) for every place where one of `names` is an attribute, a keyword or an override.

    Protocols are left out, which describe what others have; and expressions inside f-strings, whose columns
    Python 3.11 does not tell.
    """
    lines = text.splitlines(keepends=True)
    waiting: list[ast.AST] = [ast.parse(text)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.JoinedStr) or _is_protocol(node):
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Attribute) and node.attr in names:
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            yield f"line {node.end_lineno}: .{node.attr}", _insert(lines, node.end_lineno, node.end_col_offset)
        elif isinstance(node, ast.keyword) and node.arg in names:
            yield f"line {node.lineno}: {node.arg}=", _insert(lines, node.lineno, node.col_offset + len(node.arg))
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name in names:
                    start = method.col_offset + len("def ") + len(method.name)
                    yield f"line {method.lineno}: def {method.name}", _insert(lines, method.lineno, start)


def _is_protocol(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef) and any(isinstance(b, ast.Name) and b.id == "Protocol" for b in node.bases)


def _insert(lines: list[str], line: int, column: int) -> str:
    changed = list(lines)
    raw = changed[line - 1].encode()
    changed[line - 1] = (raw[:column] + b"x" + raw[column:]).decode()
    return "".join(changed)


def vocabulary(interface: Mapping[str, Any]) -> set[str]:
    """Return every name of the bindings that the kit might misspell."""
    words = set(interface["classes"]) | set(interface["enums"])
    for about in interface["classes"].values():
        words |= set(about["methods"]) | set(about["properties"]) | set(about["nested"]) | set(about["overrides"])
        for overloads in about["methods"].values():
            words |= {p["name"] for overload in overloads for p in overload["parameters"]}
    for members in interface["enums"].values():
        words |= set(members)
    return {word.rpartition(".")[2] for word in words} - ORDINARY


def check_misspellings(
    name: str, version: str, walk: Callable[[str, Path, Mapping[str, str]], None], folder: Path
) -> None:
    """Misspell each TensorRT name in a module in turn; fails for one that no scenario of `walk` notices."""
    right = source(name)
    walk(version, folder / "right", {name: right})
    unnoticed, count = [], 0
    for count, (what, wrong) in enumerate(misspellings(right, vocabulary(interface(version))), 1):
        try:
            walk(version, folder / str(count), {name: wrong})
        except (Exception, pytest.fail.Exception):
            continue
        unnoticed.append(what)
    assert count, "no name of TensorRT found: the search is broken"
    assert not unnoticed, f"misspelled in {name}, and no scenario noticed: {unnoticed}"
