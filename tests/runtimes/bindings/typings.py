"""Write type stubs of TensorRT from the real bindings: `python -m tests.bindings.typings`, then look at the difference.

mypy checks the engine code against both versions. The stubs hold the classes that the kit uses and every enum that
these mention; another class is `object` there, so using one without listing it here is a type error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.runtimes.bindings.real import ROOT, VERSIONS, interface

CLASSES = (
    "Builder",
    "Dims",
    "EngineInspector",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IHostMemory",
    "ILogger",
    "INetworkDefinition",
    "IOptimizationProfile",
    "IProgressMonitor",
    "IStreamReaderV2",
    "IStreamWriter",
    "ITensor",
    "ITimingCache",
    "OnnxParser",
    "OnnxParserRefitter",
    "ParserError",
    "Refitter",
    "Runtime",
)
CALLED_BACK = ("ILogger", "IProgressMonitor", "IStreamReaderV2", "IStreamWriter")  # TensorRT hands them plain ints
ENUMS = ("BuilderFlag", "LayerInformationFormat", "MemoryPoolType", "NetworkDefinitionCreationFlag")
LAYERS = re.compile(r"add_(?!optimization_profile)")  # networks come from ONNX here, never layer by layer
PLAIN = ("None", "bool", "int", "float", "str", "bytes", "object", "tuple", "list")


def path(version: str) -> Path:
    """Return where the stub of a version stands: typings/tensorrt-11.4/tensorrt.pyi."""
    return ROOT / "typings" / f"tensorrt-{'.'.join(version.split('.')[:2])}" / "tensorrt.pyi"


def stub(described: Mapping[str, Any]) -> str:
    """Return the text of tensorrt.pyi."""
    known = {name: described["classes"][name] for name in CLASSES}
    mentioned = set(ENUMS)
    for about in known.values():
        for kind in _kinds(about):
            mentioned |= {word for word in re.findall(r"[\w.]+", kind) if word in described["enums"]}
    names = {*known, *mentioned}
    lines = [
        f"# Made by python -m tests.bindings.typings from tensorrt-cu13-bindings {described['version']}; do not edit.",
        "# ruff: noqa",
        "# fmt: off",
        "from collections.abc import Sequence",
        "from typing import Any, ClassVar, SupportsFloat, SupportsInt, overload",
        "",
        "from typing_extensions import Buffer",
        "",
        "__version__: str",
    ]
    for enum in sorted(name for name in mentioned if "." not in name):
        lines += ["", *_enum(enum, described["enums"][enum])]
    for name, about in known.items():
        base = next((b for b in about["bases"] if b in known), "")
        lines += ["", f"class {name}({base}):" if base else f"class {name}:"]
        for nested in sorted(n for n in mentioned if n.startswith(f"{name}.")):
            lines += [f"    {line}" for line in _enum(nested, described["enums"][nested])]
        lines += [f"    {line}" for line in _body(name, about, names)]
    return "\n".join(lines) + "\n"


def _kinds(about: Mapping[str, Any]) -> Iterator[str]:
    for method, overloads in about["methods"].items():
        if not LAYERS.match(method):
            for overload in overloads:
                yield overload["returns"]
                yield from (p["type"] for p in overload["parameters"])
    yield from (p["type"] for p in about["properties"].values())


def _enum(name: str, members: Mapping[str, int]) -> list[str]:
    return [
        f"class {name.rpartition('.')[2]}:",
        *(f"    {member}: ClassVar[{name}]  # {value}" for member, value in members.items()),
        f"    __members__: ClassVar[dict[str, {name}]]",
        "    name: str",
        "    value: int",
        "    def __int__(self) -> int: ...",
        "    def __index__(self) -> int: ...",
    ]


def _body(name: str, about: Mapping[str, Any], names: set[str]) -> Iterator[str]:
    empty = True
    for method, overloads in sorted(about["methods"].items()):
        if LAYERS.match(method):
            continue
        empty = False
        if method in about["overrides"]:  # Python subclasses are called with other arguments than the docstring says
            arguments = "".join(f", {a}: Any" for a in about["overrides"][method])
            yield f"def {method}(self{arguments}) -> Any: ..."
            continue
        for overload in overloads:
            if len(overloads) > 1:
                yield "@overload"
            parameters = overload["parameters"]
            # a parameter without default may follow one with: mypy wants a default there, too
            seen = False
            arguments = ""
            for p in parameters:
                seen = seen or p["optional"]
                arguments += f", {p['name']}: {_type(p['type'], names)}{' = ...' if seen else ''}"
            if name in CALLED_BACK:
                arguments = arguments.replace("SupportsInt", "int")
            yield f"def {method}(self{arguments}) -> {_type(overload['returns'], names, True)}: ..."
    if name == "IHostMemory":
        yield "def __buffer__(self, flags: int, /) -> memoryview: ..."
    for attribute, prop in sorted(about["properties"].items()):
        empty = False
        yield "@property"
        yield f"def {attribute}(self) -> {_type(prop['type'], names, True)}: ..."
        if prop["writable"]:
            yield f"@{attribute}.setter"
            yield f"def {attribute}(self, value: {_type(prop['type'], names)}) -> None: ..."
    if empty:
        yield "..."


def _type(kind: str, names: set[str], returned: bool = False) -> str:
    kind = kind.replace("collections.abc.Sequence", "Sequence")
    if kind == "Dims":
        return "tuple[int, ...]" if returned else "Dims | Sequence[int]"
    if kind in ("list[Dims]",):
        return "list[tuple[int, ...]]"
    if kind == "tuple":
        return "tuple[int, ...]"
    if kind == "list":
        return "list[Any]"
    kind = re.sub(r"\btyping(?:_extensions)?\.", "", kind)
    words = re.findall(r"[A-Za-z_][\w.]*", kind)
    fine = {*names, *PLAIN, "Sequence", "SupportsInt", "SupportsFloat", "Buffer"}
    return kind if all(word in fine for word in words) else "object"


def main() -> int:
    for version in VERSIONS:
        out = path(version)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(stub(interface(version)))
        print(out.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
