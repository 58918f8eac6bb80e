"""Command-line entry point: `python -m benchmarks`; prints a benchmark's table, or its facts as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kit import commands
from kit.errors import UsageError
from kit.outputs import check_out_file


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the chosen benchmark; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def finish(args: argparse.Namespace, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        facts = {**facts, "command": command_line(argv)}
        if args.save is not None:
            args.save.write_text(json.dumps(facts, indent=1) + "\n")
        if not args.json:
            print(args.module.table(facts))
        return facts

    return commands.main("benchmarks", argv, prog, _add_save, finish)


def _add_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", type=_saved, metavar="FILE", help="also write the JSON to this file; default: none")


def _saved(text: str) -> Path:
    """Check the file before the benchmark runs, which may take hours; raises UsageError."""
    path = Path(text)
    check_out_file(path, option="--save")
    if not path.parent.is_dir():
        raise UsageError(f"--save {path}: {path.parent} does not exist")
    return path


def command_line(argv: Sequence[str]) -> str:
    """Return the command line as a reader would type it, without the path where this machine saved the result."""
    words = [word for i, word in enumerate(argv) if "--save" not in (word, *argv[max(i - 1, 0) : i])]
    return " ".join(["python -m benchmarks", *(word or '""' for word in words)])


if __name__ == "__main__":
    sys.exit(main())
