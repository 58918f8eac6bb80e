"""The command `export lint`: would TensorRT take every node of an artifact?"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from export.lint.operators import VERSIONS, parse_versions
from kit.errors import CheckFailed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("artifact", type=Path, metavar="DIR", help="what `export onnx` or `quantize apply` wrote")
    parser.add_argument(
        "--tensorrt", default=",".join(VERSIONS), metavar="VERSIONS", help="comma-separated versions of TensorRT"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check and print; raises CheckFailed when a node would be refused."""
    from export.lint.lint import lint

    findings, nodes = lint(args.artifact, parse_versions(args.tensorrt))
    for finding in findings:
        print(finding, file=sys.stderr)
    for part, count in nodes.items():
        mine = sum(finding.graph == part for finding in findings)
        print(f"{part:<19} {count:>5} nodes  {f'{mine} findings' if mine else 'accepted'}")
    if findings:
        raise CheckFailed(f"{args.artifact}: TensorRT would refuse {len(findings)} nodes; the lines above say which")
    return {"artifact": str(args.artifact), "nodes": nodes, "tensorrt": args.tensorrt.split(",")}
