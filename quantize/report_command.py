"""`quantize report`: which share of an artifact really runs quantized."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kit.artifact import verify
from kit.errors import UsageError

PARTS = ("text_encoder", "transformer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", type=Path, metavar="DIR", help="what `quantize apply` wrote")
    parser.add_argument(
        "--runtime",
        choices=("graph", "onnxruntime"),
        default="onnxruntime",
        help="onnxruntime: read the optimized graph that its CPU provider runs (artifacts that compute in fp32)",
    )
    parser.add_argument("--width", type=int, metavar="PIXELS", help="of the image that shares are counted for")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="of the same image")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Report; returns the same facts."""
    manifest = verify(args.artifact, ("onnx", "quantized"))
    variant = manifest.variant
    runtime = args.runtime == "onnxruntime"
    if runtime and manifest.compute != "fp32":
        raise UsageError(
            f"{args.artifact} computes in {manifest.compute}, which ONNX Runtime's CPU provider cannot run: "
            f"add --runtime graph, or look at the layers of the TensorRT engine"
        )
    width, height = args.width or variant.image_size, args.height or variant.image_size
    tokens = {"text_encoder": variant.text_tokens, "transformer": variant.text_tokens + variant.tokens(width, height)}
    from quantize.kernel_report import prove

    facts: dict[str, Any] = {"artifact": str(args.artifact), "recipe": manifest.recipe, "parts": {}}
    for part in PARTS:
        if part not in manifest.parts:
            continue
        proof = prove(args.artifact, manifest, part, tokens[part], runtime)  # type: ignore[arg-type]
        facts["parts"][part] = asdict(proof)
        kinds = ", ".join(f"{count} {kind}" for kind, count in proof.quantized.items()) or "none quantized"
        print(f"{part}: {proof.products} products with weights, {kinds}; {proof.casts_in_blocks} Casts in blocks")
        print(
            f"  the graph asks for {proof.flops_share:.1%} of their operations at {tokens[part]} rows in low precision"
        )
        if proof.running_share is not None:
            kernels = ", ".join(f"{count} {kernel}" for kernel, count in proof.fused.items()) or "no quantized kernel"
            print(f"  ONNX Runtime runs {proof.running_share:.1%} of them in integer kernels: {kernels}")
            if proof.fallbacks:
                print(f"  {len(proof.fallbacks)} fall back to fp32: {', '.join(proof.fallbacks[:4])}, ...")
    return facts
