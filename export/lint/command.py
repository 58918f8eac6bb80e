"""Command `export lint`: check whether TensorRT supports every node of an artifact."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from export.lint.operators import VERSIONS, parse_versions
from kit.errors import CheckFailed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "artifact", type=Path, metavar="DIR", help="artifact written by `export onnx` or `quantize apply`"
    )
    parser.add_argument(
        "--tensorrt", default=",".join(VERSIONS), metavar="VERSIONS", help="comma-separated versions of TensorRT"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Lint the artifact and print the findings; raises CheckFailed if TensorRT would reject a node."""
    from export.lint.lint import lint

    findings, nodes = lint(args.artifact, parse_versions(args.tensorrt))
    for finding in findings:
        print(finding, file=sys.stderr)
    for part, count in nodes.items():
        mine = sum(finding.graph == part for finding in findings)
        print(f"{part:<19} {count:>5} nodes  {f'{mine} findings' if mine else 'accepted'}")
    if findings:
        raise CheckFailed(f"{args.artifact}: TensorRT would reject {len(findings)} nodes, listed above")
    return {"artifact": str(args.artifact), "nodes": nodes, "tensorrt": args.tensorrt.split(",")}
