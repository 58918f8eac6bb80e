"""Read signatures from the docstrings of pybind11 functions, which hide them from `inspect`.

The first line reads "name(self: pkg.Class, a: int, b: str = None) -> bool"; for overloaded functions each overload has
such a line with a number before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

OVERLOAD = re.compile(r"^\d+\. (?=\w+\()", re.MULTILINE)
REPR = re.compile(r"= <[^>]*>")  # a default that is no Python expression: <BuilderFlag.REFIT: 2>
CPP_NAME = re.compile(r"\b(?:\w+::)+(\w+)")  # a class that was not yet registered when the function was
MODULE = re.compile(r"\b(?:tensorrt_bindings\.tensorrt|tensorrt_rtx_bindings\.tensorrt_rtx|tensorrt)\.(?=\w)")
CPP_ONLY = {"IParserError": "ParserError", "IBuilder": "Builder"}  # whose Python name differs
FUNCTION = re.compile(r"(\w+)\((.*)\)$")


def signatures(doc: str) -> list[dict[str, Any]]:
    """Return every overload as {"parameters": [{"name", "type", "optional"}], "returns": type}."""
    lines = [m.string[m.end() :].splitlines()[0] for m in OVERLOAD.finditer(doc)] or doc.strip().splitlines()[:1]
    return [found for line in lines if (found := _parse(line)) is not None]


def plain_type(text: str) -> str:
    """Leave package names and C++ namespaces out of a type."""
    return MODULE.sub("", CPP_NAME.sub(lambda m: CPP_ONLY.get(m[1], m[1]), text)).strip()


def _parse(line: str) -> dict[str, Any] | None:
    head, arrow, returns = REPR.sub("= None", line).rpartition(" -> ")
    function = FUNCTION.match(head)
    if not arrow or function is None:
        return None
    parameters = []
    for text in _split(function[2]):
        name, colon, rest = text.partition(":")
        kind, equals, _ = rest.partition(" = ")
        if not colon:
            raise ValueError(f"a signature of a form that this reader does not know: {line}")
        parameters.append({"name": name.strip(), "type": plain_type(kind), "optional": bool(equals)})
    return {"parameters": [p for p in parameters if p["name"] != "self"], "returns": plain_type(returns)}


def _split(arguments: str) -> Iterator[str]:
    """Split at the commas that stand in no bracket."""
    depth, start = 0, 0
    for position, letter in enumerate(arguments):
        depth += (letter in "[(") - (letter in ")]")
        if letter == "," and depth == 0:
            yield arguments[start:position]
            start = position + 1
    if arguments.strip():
        yield arguments[start:]
