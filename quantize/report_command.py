"""`quantize report`: print which share of an artifact's operations runs in quantized kernels."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kit.artifact import Manifest, verify
from kit.errors import UsageError
from kit.ports import QUANTIZED_PARTS, SERVED_PARTS, PartName
from kit.providers import PROVIDERS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="DIR", help="what `quantize apply` wrote")
    parser.add_argument(
        "--runtime",
        choices=("graph", "onnxruntime"),
        default="onnxruntime",
        help="onnxruntime: read the graph that its CPU provider runs after optimization (fp32 artifacts only); "
        "graph: read the artifact's own graph",
    )
    parser.add_argument(
        "--provider",
        choices=tuple(PROVIDERS),
        help="open the parts with this provider of ONNX Runtime and report the nodes that it leaves to other "
        "providers; default: none",
    )
    for side in ("width", "height"):
        about = f"{side} of the image for which operations are counted; default: the checkpoint's"
        parser.add_argument(f"--{side}", type=int, metavar="PIXELS", help=about)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Print the report and return the same facts."""
    manifest = verify(args.artifact, ("onnx", "quantized"))
    if args.provider is not None:
        return _report_provider(args.artifact, manifest, args.provider)
    variant = manifest.variant
    runtime = args.runtime == "onnxruntime"
    if runtime and manifest.compute != "fp32":
        raise UsageError(
            f"{args.artifact} computes in {manifest.compute}, which ONNX Runtime's CPU provider cannot run: "
            f"add --runtime graph, or inspect the layers of the TensorRT engine"
        )
    width, height = args.width or variant.image_size, args.height or variant.image_size
    tokens: dict[PartName, int] = {
        "text_encoder": variant.text_tokens,
        "transformer": variant.text_tokens + variant.tokens(width, height),
    }
    from quantize.kernel_report import report_kernels

    facts: dict[str, Any] = {"artifact": str(args.artifact), "recipe": manifest.recipe, "parts": {}}
    for part in QUANTIZED_PARTS:
        if part not in manifest.parts:
            continue
        report = report_kernels(args.artifact, manifest, part, tokens[part], runtime)
        facts["parts"][part] = asdict(report)
        kinds = ", ".join(f"{count} {kind}" for kind, count in report.quantized.items()) or "none quantized"
        print(f"{part}: {report.products} products with weights, {kinds}; {report.casts_in_blocks} Casts in blocks")
        print(
            f"  in the graph, {report.flops_share:.1%} of their operations at {tokens[part]} rows are in low precision"
        )
        if report.running_share is not None:
            kernels = ", ".join(f"{count} {kernel}" for kernel, count in report.fused.items()) or "no quantized kernel"
            print(f"  ONNX Runtime runs {report.running_share:.1%} of them in integer kernels: {kernels}")
            if report.fallbacks:
                print(f"  {len(report.fallbacks)} products fall back to fp32: {', '.join(report.fallbacks[:4])}, ...")
    return facts


def _report_provider(artifact: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    """Print who runs the nodes of each part and return the same facts."""
    from quantize.provider_report import report_assignment

    row = PROVIDERS[name]
    facts: dict[str, Any] = {"artifact": str(artifact), "recipe": manifest.recipe, "provider": row.title, "parts": {}}
    for part in SERVED_PARTS:
        if part not in manifest.parts:
            continue
        found = report_assignment(artifact, manifest, part, row)
        facts["parts"][part] = asdict(found)
        print(f"{part}: {', '.join(f'{count} nodes on {title}' for title, count in found.nodes.items())}")
        if row.on_gpu and found.on_cpu:
            print(f"  {len(found.on_cpu)} nodes would run on the CPU: {', '.join(found.on_cpu[:4])}, ...")
    return facts
