"""Read the prompts of a file by its kind: text lines, JSON lines, JSON, or a table with a column of prompts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kit.errors import UsageError
from kit.json_object import shown

COLUMNS = ("prompt", "caption")  # names of the column or key that holds a prompt; the first one there is taken
Numbered = tuple[str, str]  # a name for messages and ids such as "line-0001", and the prompt


def read_text(path: Path) -> str:
    """Read a file as UTF-8 without a byte order mark."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: byte {error.start} is not valid UTF-8; save the file as UTF-8") from None


def read_prompts(path: Path, content: str) -> Iterator[Numbered]:
    """Yield the prompts of a file; raises UsageError that names the file and the line."""
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(
            f"{path}: prompts are read from {', '.join(READERS)} files; a file of one prompt per line is named .txt"
        )
    return reader(path, content)


def _lines(content: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty; only line feeds end a line, as in an editor."""
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _from_text(path: Path, content: str) -> Iterator[Numbered]:
    for number, line in _lines(content):
        if line.startswith("{") and _is_object(line):
            raise UsageError(f"{path}, line {number}: is a JSON object and not a prompt; name the file .jsonl")
        yield f"line-{number:04d}", line


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _from_json_lines(path: Path, content: str) -> Iterator[Numbered]:
    for number, line in _lines(content):
        where = f"{path}, line {number}"
        yield f"line-{number:04d}", _prompt(where, parse(where, line))


def _from_list(path: Path, content: str) -> Iterator[Numbered]:
    entries = parse(str(path), content)
    if not isinstance(entries, list):
        raise UsageError(
            f'{path}: expected a list of prompts, or {{"format": 1, "prompts": [...]}} as in the set of the kit'
        )
    for number, entry in enumerate(entries, start=1):
        yield f"entry-{number:04d}", _prompt(f"{path}, entry {number}", entry)


def _table(delimiter: str) -> Callable[[Path, str], Iterator[Numbered]]:
    def read(path: Path, content: str) -> Iterator[Numbered]:
        rows = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
        try:
            column = next((name for name in COLUMNS if name in (rows.fieldnames or ())), None)
            if column is None:
                raise UsageError(
                    f"{path}: has no column {' or '.join(COLUMNS)}; its first line has: "
                    f"{shown(', '.join(rows.fieldnames or ()))}"
                )
            if list(rows.fieldnames or ()).count(column) > 1:
                raise UsageError(f"{path}: has the column {column!r} twice")
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                if None in row:
                    raise UsageError(f"{where}: has more values than columns; put prompts with commas in quotes")
                yield f"line-{rows.line_num:04d}", _prompt(where, row[column])
        except csv.Error as error:
            raise UsageError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from None

    return read


def parse(where: str, text: str) -> Any:
    """Parse JSON; raises UsageError that names the place."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where}: not valid JSON ({error})") from None


def _prompt(where: str, entry: Any) -> str:
    """Return the prompt of an entry: text, or an object with a key for it."""
    if isinstance(entry, dict):
        key = next((name for name in COLUMNS if name in entry), None)
        if key is None:
            raise UsageError(f"{where}: has no key {' or '.join(COLUMNS)}; it has: {shown(', '.join(map(str, entry)))}")
        entry = entry[key]
    if not isinstance(entry, str) or not entry.strip():
        raise UsageError(f"{where}: {shown(entry)} is not a prompt")
    return entry.strip()


READERS: Mapping[str, Callable[[Path, str], Iterator[Numbered]]] = {
    ".txt": _from_text,
    ".jsonl": _from_json_lines,
    ".json": _from_list,
    ".csv": _table(","),
    ".tsv": _table("\t"),
}
