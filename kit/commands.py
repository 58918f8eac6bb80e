"""The command line: `python -m ROOM COMMAND` and `flux2 ROOM COMMAND`, one table of commands for all rooms.

The module behind a command is imported when the command is chosen, by its name in this table, so that the table can
stand on the ground floor and `kit plan` never loads what `export onnx` needs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn, Protocol, cast

from kit import __version__
from kit.cli import report
from kit.errors import UsageError
from kit.extras import extra_for


class CommandModule(Protocol):
    """What the module behind a command has; `run` returns the facts that --json prints."""

    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], Mapping[str, Any] | None]


@dataclass(frozen=True)
class Room:
    """A top-level package with a command line: what it is for, and (module, about) of each command."""

    about: str
    commands: Mapping[str, tuple[str, str]]
    more: str = ""  # printed below the list of commands


ROOMS: Mapping[str, Room] = {
    "kit": Room(
        "what fits on a GPU, and what this machine can do",
        {
            "doctor": ("planner.doctor", "show what this machine has and what it can export, build and run"),
            "plan": ("planner.command", "show what fits on a GPU, how fast it runs and what it costs"),
        },
    ),
    "export": Room(
        "checkpoint to ONNX and TensorRT, without loading a weight",
        {
            "onnx": ("export.onnx_command", "export a checkpoint to ONNX"),
            "lint": ("export.lint.command", "check every node of an artifact against TensorRT's operator table"),
            "engine": ("runtimes.trt.build.command", "build TensorRT engines of an artifact for one GPU"),
            "layers": ("runtimes.trt.layers_command", "show what the compiler made of a graph: kernels, types, bytes"),
            "aoti": ("export.aoti.command", "compile a checkpoint with AOTInductor for this machine, quantized or not"),
        },
    ),
    "quantize": Room(
        "calibrate, quantize, and prove that the images are as good",
        {
            "calibrate": (
                "quantize.calibration.command",
                "run a checkpoint over prompts and record its activations",
            ),
            "merge": ("quantize.calibration.merge_command", "merge calibration records of one checkpoint"),
            "apply": ("quantize.apply.command", "quantize an artifact by a recipe"),
            "compile": ("export.aoti.command", "the old name of `export aoti`"),
            "report": ("quantize.report_command", "report how much of an artifact really runs quantized"),
            "gate": ("quantize.gate.command", "compare a quantized artifact's images with those of its reference"),
            "compare": ("quantize.gate.compare_command", "show two reports of the gate side by side"),
            "search": (
                "quantize.search.command",
                "choose which layers stay in high precision to meet a quality target",
            ),
        },
    ),
    "serve": Room(
        "deploy an artifact on Triton and request images from it",
        {
            "repository": ("serve.commands.repository", "write a Triton model repository from an artifact"),
            "run": ("serve.commands.run", "run a deployment on Triton until Ctrl-C"),
            "generate": ("serve.commands.generate", "request an image from a running server"),
        },
    ),
    "benchmarks": Room(
        "the benchmarks behind all published numbers; each prints a table, or one JSON object with --json",
        {
            "availability": (
                "benchmarks.availability",
                "a deployment under kills, overload, cancellations and a soak test",
            ),
            "clients": (
                "benchmarks.clients.command",
                "a deployment measured by perf_analyzer, AIPerf and locust, compared with our client",
            ),
            "compile": ("benchmarks.compile", "what TensorRT for RTX makes of the published sizes, without a GPU"),
            "activations": (
                "benchmarks.activations",
                "activation memory by the compiler and by the planner's formulas",
            ),
            "compare": ("benchmarks.compare", "two results of one benchmark: what changed, and what is noise"),
            "cpu": ("benchmarks.cpu_int8", "klein-4b and the sample in int8 on this CPU, compared with diffusers"),
            "engine": (
                "benchmarks.engine",
                "one part in several runtimes side by side, and the machine's ceilings",
            ),
            "export": ("benchmarks.export_cost", "time, memory and bytes of an export at full size"),
            "gallery": ("benchmarks.gallery", "the images of the README, generated by a real server"),
            "gate": ("benchmarks.gate_power", "what the quality gate catches: null runs and planted faults"),
            "gpu": ("benchmarks.gpu.command", "transformer, parts and whole images on a GPU, with random weights"),
            "outliers": ("benchmarks.outliers", "error of each recipe on blocks whose activations have outliers"),
            "overhead": ("benchmarks.overhead", "what a server adds to the pipeline in one process, and where it goes"),
            "parity": (
                "benchmarks.export_parity",
                "exported blocks of true width in ONNX Runtime, compared with torch",
            ),
            "plan": ("benchmarks.plan_validation", "the planner against published measurements"),
            "quantize": ("benchmarks.quantize_cost", "time and memory of quantizing klein-4b, compared with cp"),
            "reading": ("benchmarks.reading", "how well the gate's readers read rendered text, per script"),
            "serving": (
                "benchmarks.serving.command",
                "a deployment under load: capacity, latency, policies, cost, the planner's queue",
            ),
            "report": ("benchmarks.report.command", "write docs/results.md and its plots from benchmarks/results"),
            "search": ("benchmarks.search", "mixed precision on the sample: predicted and measured effects"),
        },
        "also: python -m benchmarks.demo (make demo), python -m benchmarks.sample (trains and judges the sample), "
        "python -m benchmarks.cpu_trials (int8 products that were tried), python -m benchmarks.generated_docs",
    ),
}


EXIT_CODES = (
    "exit codes: 0 done, 1 a check, server or runtime failed, 2 wrong use or bad input, 130 interrupted, "
    "141 the reader of the output is gone"
)


MAY_BE_EMPTY = ("PROMPT", "TEXT", "A,B")  # neither names nor paths: judged by the server or by the command


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Prints the defaults of options that have one, and keeps the lines of descriptions."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        absent = action.default is None or action.default is False or action.default in ([], (), argparse.SUPPRESS)
        shown = not absent and "default" not in text
        return f"{text} (default: %(default)s)".strip() if shown and action.option_strings else text


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are the kit's own errors, so that --json covers them too.

    Options are not abbreviated: scripts would break when a longer one is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Reject empty values: an empty path would mean the current folder, and an empty name matches nothing."""
        allowed = action.metavar in MAY_BE_EMPTY or action.nargs == argparse.PARSER  # the words of a whole command
        if not arg_string and action.default != arg_string and not allowed:
            raise argparse.ArgumentError(action, "the value is empty")
        return super()._get_value(action, arg_string)


def main(
    room: str,
    argv: Sequence[str] | None = None,
    prog: str | None = None,
    extend: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
    finish: Callable[[argparse.Namespace, Mapping[str, Any]], Mapping[str, Any]] = lambda args, facts: facts,
) -> int:
    """Run one command of a room; returns the exit code.

    `extend` adds options that all commands of the room have, `finish` does what all do with their facts.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    prog = prog or f"python -m {room}"

    def step() -> Mapping[str, Any] | None:
        try:
            args, unknown = parser(room, argv, prog, extend).parse_known_args(argv)
            if unknown:
                raise UsageError(f"unrecognized arguments: {' '.join(unknown)}; see {prog} {args.command} --help")
            facts = args.module.run(args)
            return None if facts is None else finish(args, facts)
        except ModuleNotFoundError as error:
            command = " ".join([room, *(word for word in argv[:1] if word in ROOMS[room].commands)])
            package = (error.name or "").split(".")[0]
            extra = extra_for(command, package)
            if extra is None:
                raise  # a bug, not something to install
            raise UsageError(f"{command} needs the package {package}: pip install 'flux2-deploy[{extra}]'") from error

    return report(step, "--json" in argv)


def flux2(argv: Sequence[str] | None = None) -> int:
    """Run `flux2 ROOM COMMAND ...`, the console script; returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv and argv[0] in ROOMS:
        return int(import_module(f"{argv[0]}.__main__").main(argv[1:], prog=f"flux2 {argv[0]}"))

    def step() -> None:
        about = "Compile and serve FLUX.2 on your own GPUs."
        top = Parser(prog="flux2", description=about, epilog=EXIT_CODES, formatter_class=Help)
        top.add_argument("--version", action="version", version=f"flux2-deploy {__version__}")
        rooms = top.add_subparsers(required=True, metavar="ROOM")
        for name, room in ROOMS.items():
            rooms.add_parser(name, help=f"{room.about}: {', '.join(room.commands)}")
        top.parse_args(argv)

    return report(step, "--json" in argv)


def parser(
    room: str, argv: Sequence[str], prog: str, extend: Callable[[argparse.ArgumentParser], None] = lambda parser: None
) -> Parser:
    """Describe a room's command line; only the module of the command that `argv` chooses is loaded."""
    chosen_room = ROOMS[room]
    text = f"{chosen_room.about[0].upper()}{chosen_room.about[1:]}."
    top = Parser(prog=prog, description=text, epilog=chosen_room.more or EXIT_CODES, formatter_class=Help)
    top.add_argument("--version", action="version", version=f"flux2-deploy {__version__}")
    commands = top.add_subparsers(required=True, metavar="COMMAND", dest="command")
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, about) in chosen_room.commands.items():
        text = f"{about[0].upper()}{about[1:]}."
        command = commands.add_parser(name, help=about, description=text, formatter_class=Help)
        if name == chosen:
            loaded = load(module)
            loaded.add_arguments(command)
            extend(command)
            command.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
            command.set_defaults(module=loaded)
    return top


def load(module: str) -> CommandModule:
    """Import the module behind a command."""
    return cast(CommandModule, import_module(module))
