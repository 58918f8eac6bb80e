"""Describe the TensorRT bindings that this process can import, as JSON on stdout; `real.py` runs it as a process."""

from __future__ import annotations

import importlib
import json
import re
import sys
from typing import Any

from kit.compilers import COMPILERS, activate
from tests.runtimes.bindings.signatures import plain_type, signatures

OVERRIDE = re.compile(
    r"def (\w+)\(self(?:, )?([^)]*)\)"
)  # how a subclass in Python must look, where the class's text tells


def describe(trt: Any) -> dict[str, Any]:
    """Return version, classes and enums; nested enums stand under "Outer.Inner"."""
    found: dict[str, Any] = {"version": trt.__version__, "classes": {}, "enums": {}}
    for name, value in sorted(vars(trt).items()):
        if isinstance(value, type) and type(value).__name__ == "pybind11_type":
            _add(found, name, value)
    return found


def _add(found: dict[str, Any], name: str, cls: type) -> None:
    if hasattr(cls, "__members__"):
        found["enums"][name] = {member: int(value) for member, value in cls.__members__.items()}
        return
    described: dict[str, Any] = {
        "bases": [
            b.__name__
            for b in cls.__mro__[1:]
            if type(b).__name__ == "pybind11_type" and b.__name__ != "pybind11_object"
        ],
        "methods": {},
        "properties": {},
        "nested": {},
        "overrides": {
            method: [a.split(":")[0].strip() for a in arguments.split(",") if a.strip()]
            for method, arguments in OVERRIDE.findall(cls.__doc__ or "")
            if method != "__init__"
        },
    }
    for attribute in dir(cls):
        if attribute.startswith("_") and attribute != "__init__":
            continue
        value = getattr(cls, attribute)
        if isinstance(value, property):
            doc = (value.fget.__doc__ or "") if value.fget else ""
            described["properties"][attribute] = {
                "type": plain_type(doc.strip().splitlines()[0].rpartition(" -> ")[2]) if "->" in doc else "object",
                "writable": value.fset is not None,
            }
        elif isinstance(value, type):
            described["nested"][attribute] = f"{name}.{attribute}"
            _add(found, f"{name}.{attribute}", value)
        elif callable(value) and (overloads := signatures(value.__doc__ or "")):
            described["methods"][attribute] = overloads
    found["classes"][name] = described


if __name__ == "__main__":
    if sys.argv[1] == "tensorrt-rtx":
        json.dump(describe(activate(COMPILERS["tensorrt-rtx"])), sys.stdout)
    else:
        json.dump(describe(importlib.import_module("tensorrt_bindings")), sys.stdout)
