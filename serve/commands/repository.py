"""The command `serve repository`: write a Triton model repository from an artifact."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from kit.certificate import quality
from kit.errors import UsageError
from pipeline.request import Limits
from serve.settings import MOST_LIVE, GraphChoice, KnownAnswer, Settings, Tuning

MAY_BE_ZERO = ("threads", "max_guidance", "max_references", "cache_bytes")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; limits and tuning follow their dataclasses."""
    parser.add_argument(
        "artifact",
        type=Path,
        metavar="DIR",
        help="what `export onnx`, `quantize apply`, `export engine` or `export aoti` wrote",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the deployment to write")
    for group, defaults in (("limits of a request", Limits()), ("use of the machine", Tuning())):
        section = parser.add_argument_group(group)
        for item in _options(type(defaults)):
            value = getattr(defaults, item.name)
            choices = get_args(get_type_hints(type(defaults))[item.name]) or None
            section.add_argument(
                f"--{item.name.replace('_', '-')}",
                type=type(value),
                default=value,
                choices=choices,
                metavar=None if choices else "N",
                help=item.metadata["about"],
            )
    parser.add_argument(
        "--runtime",
        choices=(*get_args(GraphChoice), "auto"),
        default="ort-cpu",
        help="runtime of ONNX graphs: a provider of ONNX Runtime, OpenVINO with fp32 or bf16 products, or auto: the "
        "one that is fastest on this CPU in a few timed steps; engines and packages bring their own",
    )
    parser.add_argument(
        "--known-answer",
        choices=get_args(KnownAnswer),
        default="generate",
        help="generate: store an image that the server must reproduce before it is ready; none: skip this, where the "
        "engines cannot be loaded",
    )
    parser.add_argument(
        "--copy",
        action="store_true",
        help="copy the files instead of hard-linking them, and verify the weights while copying",
    )
    parser.add_argument(
        "--require-gate", action="store_true", help="reject an artifact that has not passed `quantize gate`"
    )


def _options(cls: type[Any]) -> list[Field[Any]]:
    """List the fields that are options; others follow from the artifact."""
    return [item for item in fields(cls) if "about" in item.metadata]


def _chosen(args: argparse.Namespace, cls: type[Any]) -> Any:
    values = {item.name: getattr(args, item.name) for item in _options(cls)}
    for name, value in values.items():
        if isinstance(value, str):
            continue
        if name == "live_requests" and value > MOST_LIVE:
            raise UsageError(f"--live-requests {value}: Triton serves at most {MOST_LIVE}")
        if value < (0 if name in MAY_BE_ZERO else 1):
            raise UsageError(f"--{name.replace('_', '-')} {value}: too small")
    return cls(**values)


class CopyProgress:
    """Shows the progress of a copy on stderr: a line that is rewritten on a terminal, else one line per tenth."""

    def __init__(self) -> None:
        self._shown = -1

    def report(self, done: int, total: int) -> None:
        """Show how much is done, if it is visibly more than last time."""
        terminal = sys.stderr.isatty()
        percent = 100 * done // max(total, 1)
        step = percent if terminal else percent // 10
        if step == self._shown:
            return
        self._shown = step
        text = f"copying: {percent} % of {total / 1e9:.2f} GB"
        end = "" if terminal and done < total else "\n"
        print(f"\r{text}" if terminal else text, end=end, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the deployment; returns its folder, variant and recipe."""
    from serve import reference_deploy
    from serve.fastest_runtime import describe
    from serve.repository import write_repository

    limits, tuning = _chosen(args, Limits), _chosen(args, Tuning)
    manifest = write_repository(
        args.artifact,
        args.out,
        limits,
        tuning,
        args.known_answer,
        args.require_gate,
        args.copy,
        args.runtime,
        CopyProgress().report,
    )
    taken = reference_deploy.describe(manifest.variant, Settings.read(args.out / "tokenizer" / "1").limits)
    if not args.json:
        if seconds := manifest.options.get("step_seconds"):
            print(f"runtime: {describe(seconds)}")
        print(f"wrote {args.out}: {manifest.variant.name}, {manifest.recipe}")
        print(f"quality: {quality(args.out, manifest)}")
        print(f"reference images: {taken}")
        print(f"next: python -m serve run {shlex.quote(str(args.out))}")
    measured = manifest.options.get("step_seconds", {})
    return {
        "out": str(args.out),
        "variant": manifest.variant.name,
        "recipe": manifest.recipe,
        "references": taken,
        **({"step_seconds": measured} if measured else {}),
    }
