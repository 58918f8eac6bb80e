"""Read JSON objects with typed values: null means absent, and a wrong type is an error that names place and key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import CheckpointError, UsageError

MOST = 2**31 - 1
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class JsonObject:
    """A JSON object and the place it came from, for messages; `error` is the class that its methods raise."""

    where: str
    values: Mapping[str, Any]
    error: type[UsageError] = CheckpointError

    def get(self, key: str) -> Any:
        """Return a value of any type, None if it is absent."""
        return self.values.get(key)

    def wrong(self, key: str, expected: str) -> UsageError:
        """Return the error for a value of the wrong type or out of range."""
        return self.error(f"{self.where}: {key} is {shown(self.values[key])}; expected {expected}")

    def require(self, key: str) -> Any:
        if self.get(key) is None:
            raise self.error(f"{self.where}: key {key!r} is missing")
        return self.values[key]

    def integer(self, key: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """Return a whole number; without a default, the key is required."""
        if default is not None and self.get(key) is None:
            return default
        value = self.require(key)
        if is_number(value) and value == int(value) and least <= value <= most:
            return int(value)
        raise self.wrong(key, f"a whole number from {least} to {most}")

    def number(self, key: str, default: float | None = None, least: float = -math.inf) -> float:
        """Return a finite number; without a default, the key is required."""
        if default is not None and self.get(key) is None:
            return default
        value = self.require(key)
        if is_number(value) and value >= least:
            return float(value)
        raise self.wrong(key, "a finite number" + (f" of at least {least:g}" if least > -math.inf else ""))

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a finite number above zero; without a default, the key is required."""
        value = self.number(key, default)
        if value > 0:
            return value
        raise self.wrong(key, "a positive number")

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return text; without a default, the key is required."""
        if default is not None and self.get(key) is None:
            return default
        value = self.require(key)
        if not isinstance(value, str):
            raise self.wrong(key, "text")
        return value

    def integers(self, key: str, default: tuple[int, ...], least: int = 1, most: int = MOST) -> tuple[int, ...]:
        """Return a list of at least one whole number."""
        value = self.get(key)
        if value is None:
            return default
        if (
            isinstance(value, list)
            and value
            and all(is_number(n) and n == int(n) and least <= n <= most for n in value)
        ):
            return tuple(int(n) for n in value)
        raise self.wrong(key, f"a list of whole numbers from {least} to {most}")

    def object(self, key: str) -> JsonObject | None:
        """Return an object inside this one, None if it is absent."""
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return JsonObject(f"{self.where}: {key}", value, self.error)


def is_number(value: object) -> bool:
    """Return whether a JSON value is a finite number; true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the range of a float
        return False


def shown(value: object) -> str:
    """Return a short form of a value for a message."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested too deeply; a number with thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def parse_object(text: str, where: str, error: type[UsageError] = CheckpointError) -> JsonObject:
    """Parse text that holds one JSON object."""
    try:
        loaded = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{where}: not valid JSON ({problem})") from None
    if not isinstance(loaded, dict):
        raise error(f"{where}: expected a JSON object, found {type(loaded).__name__}")
    return JsonObject(where, loaded, error)


def read_object(path: Path, error: type[UsageError] = CheckpointError) -> JsonObject:
    """Read a file that holds one JSON object, with or without a byte order mark."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise error(f"{path}: missing; a checkpoint in diffusers layout has this file") from None
    except UnicodeDecodeError as problem:
        raise error(f"{path}: not valid JSON ({problem})") from None
    return parse_object(text, str(path), error)
