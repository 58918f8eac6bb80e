"""Register `optimum-cli export flux2 CHECKPOINT OUT`, which runs this kit's exporter from optimum's command line.

optimum imports every file of the namespace optimum.commands.register at startup, so no heavy import is allowed here.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from typing import Any

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class Flux2ExportCommand(BaseOptimumCLICommand):  # type: ignore[misc]  # optimum has no type information
    """`python -m export onnx` with optimum's order of arguments."""

    COMMAND = CommandInfo(name="flux2", help="Export a FLUX.2 checkpoint to ONNX without loading its weights.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        from export.onnx_command import add_onnx_options

        parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint, as for `python -m export onnx`")
        parser.add_argument("out", metavar="OUT", help="output folder of the artifact")
        add_onnx_options(parser)
        parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")

    def run(self) -> None:
        from export.onnx_command import run_parsed

        arguments: Namespace = self.args
        sys.exit(run_parsed(arguments))


REGISTER_COMMANDS: list[tuple[type[Any], type[Any]]] = [(Flux2ExportCommand, ExportCommand)]
