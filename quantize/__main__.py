"""Command line: python -m quantize calibrate | merge | apply | compile | report | gate | search."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

from kit.cli import report


class Command(Protocol):
    """A module behind one word of the command line."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]


COMMANDS = {
    "calibrate": ("calibrate_command", "run a checkpoint over prompts and record what every linear layer sees"),
    "merge": ("merge_command", "merge calibration records of one checkpoint"),
    "apply": ("apply_command", "quantize an artifact by a recipe"),
    "compile": ("compile_command", "compile a checkpoint with AOTInductor for this machine, quantized or not"),
    "report": ("report_command", "tell which share of an artifact really runs quantized"),
    "gate": ("gate_command", "compare a quantized artifact's pictures with those of its reference"),
    "search": ("search_command", "choose which layers stay in high precision to meet a quality at the least cost"),
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Tells the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, [], False) else super()._get_help_string(action)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m quantize", description="calibrate, quantize, and prove that the pictures are as good"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, (module, about) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=about, formatter_class=Help)
        _load(module).add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    args = parser.parse_args(argv)
    return report(lambda: _load(COMMANDS[args.command][0]).run(args), args.json)


def _load(module: str) -> Command:
    return cast(Command, import_module(f"quantize.{module}"))


if __name__ == "__main__":
    sys.exit(main())
