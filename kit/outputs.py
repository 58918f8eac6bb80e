"""Decide whether a command may write to `--out`: the one rule for folders and files, checked before any work.

A folder is replaced only by a newer folder of its own kind. Nothing that the command reads, and nothing that the kit
did not write, is ever replaced.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.artifact import CERTIFICATE, CONTENTS, MANIFEST
from kit.errors import UsageError


@dataclass(frozen=True)
class Output:
    """A kind of folder that commands write, and how such a folder is recognized."""

    title: str  # with its article, for messages
    mark: str = MANIFEST  # the JSON file that is written last
    kind: str | None = None  # of an artifact's manifest
    keys: tuple[str, ...] = ("format", "kind", "files")  # of the JSON file
    contents: tuple[str, ...] = ()  # names at the top of a folder that has no manifest


ONNX = Output("an ONNX artifact", kind="onnx")
QUANTIZED = Output("a quantized artifact", kind="quantized")
ENGINE = Output("an engine artifact", kind="engine")
AOTI = Output("an AOTInductor artifact", kind="aoti")
DEPLOYMENT = Output("a deployment", kind="deployment")
GATE = Output(
    "a report of `quantize gate`",
    "report.json",
    keys=("contract", "faults", "pairs"),
    contents=("report.json", "report.md", "index.html", "images"),
)
SEARCH = Output(
    "a result of `quantize search`",
    "search.json",
    keys=("recipe", "spare", "bounds"),
    contents=("search.json", "search.md", "search.png", "recipe.json", "recipes"),
)
OUTPUTS = (ONNX, QUANTIZED, ENGINE, AOTI, DEPLOYMENT, GATE, SEARCH)
STDOUT = "-"
_ELSEWHERE = "choose another --out"


def check_out(out: Path, makes: Output, inputs: Iterable[Path | None] = ()) -> Path:
    """Return the folder to write, with symbolic links resolved; raises UsageError if it must not be written.

    `inputs` are the folders and files that the command reads: `out` must not be one of them, contain one, or lie in
    one. An existing folder must be empty or hold what this command writes, without files of anyone else.
    """
    if str(out) == STDOUT:
        raise UsageError(f"--out {out}: a folder cannot be written to stdout; give a folder name")
    folder = _resolved(out)
    _check_place(out, folder)
    _check_inputs(out, folder, inputs)
    if folder.is_dir():
        if any(folder.iterdir()):
            _check_replaceable(out, folder, makes)
    elif folder.exists():
        raise UsageError(f"--out {out} is a file, and this command writes a folder; {_ELSEWHERE}")
    return folder


def file_of(word: str | None) -> Path | None:
    """Return the file that an option names if it is one; recipes, contracts and prompt sets have other names too."""
    return Path(word) if word and Path(word).is_file() else None


def checkpoint_files(args: argparse.Namespace) -> list[Path | None]:
    """Return the files and folders on disk that the checkpoint options of a command name: all that a hub id is not."""
    words = [getattr(args, name, None) for name in ("checkpoint", "config", "transformer", "text_encoder", "vae")]
    paths = [Path(word).expanduser() for word in words if word]
    adapters = [file_of(text) or file_of(text.rpartition("=")[0]) for text in args.lora]
    return [*(path for path in paths if path.exists()), *adapters]


def check_out_file(out: Path, inputs: Iterable[Path | None] = (), option: str = "--out") -> None:
    """Raise UsageError if the file to write is a folder, or one of the files that the command reads."""
    if str(out) == STDOUT:
        raise UsageError(f"{option} {out}: stdout is not supported here; give a file name")
    file = _resolved(out, option)
    if file.is_dir():
        raise UsageError(f"{option} {out} is a folder; give a file")
    for given in inputs:
        if given is not None and _resolved(given, option) == file:
            raise UsageError(f"{option} {out} is a file that this command reads; choose another {option}")
    if problem := _unwritable(file.parent):
        raise UsageError(f"{option} {out}: cannot write to {problem}")


def _resolved(path: Path, option: str = "--out") -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise UsageError(f"{option} {path}: the path goes through a loop of symbolic links") from None


def _check_place(out: Path, folder: Path) -> None:
    """Reject folders that cannot be replaced by a rename without pulling the ground from under someone."""
    for what, place in (("the current folder", Path.cwd()), ("the home folder", _home())):
        if place is not None and place.is_relative_to(folder):
            relation = "is" if folder == place else "contains"
            raise UsageError(f"--out {out} {relation} {what}; give a new folder, such as {out / 'build'}")
    if folder.is_mount():
        raise UsageError(f"--out {out} is a mount point, which cannot be replaced; give a folder in it")
    if not folder.exists() and (problem := _unwritable(folder.parent)):
        raise UsageError(f"--out {out}: cannot write to {problem}")


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except (OSError, RuntimeError):
        return None  # no such user: a container with an arbitrary user id


def _unwritable(folder: Path) -> str | None:
    """Say which existing folder on the way to `folder` cannot be written to, and why; None if it can."""
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        return f"{nearest}: Not a directory"
    return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest}: Permission denied"


def _check_inputs(out: Path, folder: Path, inputs: Iterable[Path | None]) -> None:
    for given in inputs:
        if given is None:
            continue
        source = _resolved(given)
        if source == folder:
            raise UsageError(f"--out {out} is the input {given}; {_ELSEWHERE}")
        if source.is_relative_to(folder):
            raise UsageError(f"--out {out} contains the input {given}; {_ELSEWHERE}")
        if source.is_dir() and folder.is_relative_to(source):
            raise UsageError(f"--out {out} lies in the input {given}; {_ELSEWHERE}")


def _check_replaceable(out: Path, folder: Path, makes: Output) -> None:
    """Raise UsageError unless a folder that is not empty holds an earlier result of the same command."""
    found = recognize(folder)
    if found is None:
        named = (folder / makes.mark).exists()
        what = f"holds a {makes.mark} of another program" if named else f"has no {makes.mark}"
        what = "is not an artifact" if makes.kind else what
        raise UsageError(f"--out {out} exists and {what}; {_ELSEWHERE} or remove it")
    if found != makes:
        raise UsageError(f"--out {out} holds {found.title}, and this command writes {makes.title}; {_ELSEWHERE}")
    if (stray := next(_strays(folder, found), None)) is not None:
        raise UsageError(
            f"--out {out} holds {stray} beside {found.title}; the file would be lost: move it or {_ELSEWHERE}"
        )


def recognize(folder: Path) -> Output | None:
    """Return what a folder holds, judged by the JSON file that marks it; None if the kit did not write it."""
    for output in OUTPUTS:
        raw = _json(folder / output.mark)
        if all(key in raw for key in output.keys) and output.kind in (None, raw.get("kind")):
            return output
    return None


def _json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; returns an empty one for anything else."""
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return raw if isinstance(raw, dict) else {}


def _strays(folder: Path, found: Output) -> Iterator[Path]:
    """Yield the files in a finished folder that its command did not write, relative to the folder.

    Hidden files and compiled Python code come from other programs and can be lost.
    """
    listed = _json(folder / MANIFEST).get("files", {}) if found.kind else {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() and not path.is_symlink():
            continue
        known = name.parts[0] in found.contents or str(name) in (*found.contents, found.mark, CERTIFICATE, CONTENTS)
        passing = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        if not known and not passing and str(name) not in listed:
            yield name
