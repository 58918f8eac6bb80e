"""Command line: python -m benchmarks NAME; each prints a table, or one JSON object with --json."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from kit.cli import hush_diffusers, report

# loaded when they are chosen: the one for a GPU runs where the packages of the others are not
BENCHMARKS: dict[str, str] = {
    "cpu": "cpu_int8",
    "export": "export_cost",
    "gallery": "gallery",
    "gpu": "gpu.command",
    "outliers": "outliers",
    "parity": "export_parity",
    "plan": "plan_validation",
    "quantize": "quantize_cost",
    "search": "search",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    hush_diffusers()  # which some benchmarks import on being loaded
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK", dest="name")
    for name in BENCHMARKS:
        if name not in argv[:1]:
            commands.add_parser(name)
            continue
        module = _load(name)
        command = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.add_argument("--save", type=Path, metavar="FILE", help="also write the JSON here")
        command.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    args = parser.parse_args(argv)
    return report(lambda: _run(args), args.json)


def _load(name: str) -> Any:
    return import_module(f"benchmarks.{BENCHMARKS[name]}")


def _run(args: argparse.Namespace) -> dict[str, Any]:
    module = _load(args.name)
    facts: dict[str, Any] = module.run(args) | {"command": command_line(sys.argv[1:])}
    if args.save is not None:
        args.save.write_text(json.dumps(facts, indent=1) + "\n")
    if not args.json:
        print(module.table(facts))
    return facts


def command_line(argv: Sequence[str]) -> str:
    """Return the command line as a reader would type it: where this machine saved its result is left out."""
    words = [word for i, word in enumerate(argv) if "--save" not in (word, *argv[max(i - 1, 0) : i])]
    return " ".join(["python -m benchmarks", *(word or '""' for word in words)])


if __name__ == "__main__":
    sys.exit(main())
