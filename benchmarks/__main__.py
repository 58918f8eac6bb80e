"""Command-line entry point: `python -m benchmarks`; prints a benchmark's table, or its facts as JSON."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kit import commands
from kit.outputs import check_out_file


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the chosen benchmark; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)

    def finish(args: argparse.Namespace, facts: Mapping[str, Any]) -> Mapping[str, Any]:
        facts = {**facts, "command": command_line(argv)}
        if args.save is not None:
            check_out_file(args.save, option="--save")
            args.save.write_text(json.dumps(facts, indent=1) + "\n")
        if not args.json:
            print(args.module.table(facts))
        return facts

    return commands.main("benchmarks", argv, prog, _add_save, finish)


def _add_save(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", type=Path, metavar="FILE", help="also write the JSON to this file; default: none")


def command_line(argv: Sequence[str]) -> str:
    """Return the command line as a reader would type it, without the path where this machine saved the result."""
    words = [word for i, word in enumerate(argv) if "--save" not in (word, *argv[max(i - 1, 0) : i])]
    return " ".join(["python -m benchmarks", *(word or '""' for word in words)])


if __name__ == "__main__":
    sys.exit(main())
