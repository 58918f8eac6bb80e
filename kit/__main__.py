"""Command line: python -m kit doctor | plan."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from kit.cli import report


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, report; returns the exit code."""
    args = parser().parse_args(argv)
    return report(lambda: args.step(args), args.json)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    from kit import doctor, plan_command

    top = argparse.ArgumentParser(prog="python -m kit", description="facts: what fits where, and what this machine has")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    look = commands.add_parser("doctor", help="say what this machine has, and what it can build and run")
    doctor.add_options(look)
    look.set_defaults(step=doctor.run)
    ask = commands.add_parser("plan", help="say what fits on a GPU and how, how fast it is and what it costs")
    plan_command.add_options(ask)
    ask.set_defaults(step=plan_command.run)
    return top


if __name__ == "__main__":
    sys.exit(main())
