"""Compare an exported artifact of real width with torch: klein-4b with fewer blocks, both decoders, random weights.

    python -m benchmarks parity [--blocks 2+2] [--size 256x256] [--json]

Tiny checkpoints have the real structure but not the real widths (3072 wide, heads of 128, products over 9216 numbers),
whose sums are long enough to show errors of order or precision. Weights are drawn so that every activation keeps its
scale. torch and ONNX Runtime each run in a separate process; differences are relative to torch's largest output. Needs
10 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import machine, sparse
from benchmarks.measure import measure
from kit.errors import CheckFailed, UsageError
from kit.ports import PartName, ports
from kit.safetensors_file import StoredTensor, read_header
from kit.variants import Variant

BAR = 1e-4
SMALL_DECODER = (96, 192, 384, 384)
Array = npt.NDArray[Any]

_TORCH = """
import sys, numpy as np, torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
part, folder, feeds, out = sys.argv[1:]
feeds = {name: torch.from_numpy(array) for name, array in np.load(feeds).items()}
with torch.no_grad():
    if part == "transformer":
        result = Flux2Transformer2DModel.from_pretrained(folder + "/transformer")(**feeds, return_dict=False)[0]
    else:
        vae = AutoencoderKLFlux2.from_pretrained(folder + "/vae")
        mean, variance = (x.view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
        deviation = (variance + vae.config.batch_norm_eps).sqrt()
        if part == "vae_encoder":
            mode = vae.encode(feeds["image"]).latent_dist.mode()
            b, c, h, w = mode.shape
            packed = mode.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
            result = (packed - mean) / deviation
        else:
            z = feeds["latents"] * deviation + mean
            b, c, h, w = z.shape
            z = z.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, 2 * w)
            image = vae.decode(z, return_dict=False)[0]
            result = ((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round()
np.save(out, result.numpy())
"""
_ORT = """
import sys, numpy as np, onnxruntime as ort
graph, feeds, out = sys.argv[1:]
session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
np.save(out, session.run(None, dict(np.load(feeds)))[0])
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", default="2+2", metavar="DOUBLE+SINGLE", help="numbers of blocks")
    parser.add_argument("--size", default="256x256", metavar="WIDTHxHEIGHT", help="image size in pixels")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the facts stored in benchmarks/results/export_parity.json.

    Raises CheckFailed if a part differs from torch by more than the bar.
    """
    variant = with_blocks(Variant.named("klein-4b"), args.blocks)
    width, height = numbers(args.size, "x", "--size")
    rows = []
    with tempfile.TemporaryDirectory(prefix="flux2-bench-") as scratch:
        whole = _write(variant, Path(scratch) / "whole")
        rows += [_compare(p, variant, whole, (height, width)) for p in ("transformer", "vae_encoder", "vae_decoder")]
        small = replace(variant, vae=replace(variant.vae, decoder_channels=SMALL_DECODER))
        rows.append(_compare("vae_decoder", small, _write(small, Path(scratch) / "small"), (height, width)))
    facts = {"benchmark": "parity", "blocks": args.blocks, "size": args.size, "bar": BAR}
    facts |= {"machine": machine.describe(), "rows": rows}
    worst = max(rows, key=lambda row: row["max_difference"] / row["bar"])
    if worst["max_difference"] > worst["bar"]:
        raise CheckFailed(f"{worst['what']} differs from torch by {worst['max_difference']:.2e}; bar {worst['bar']}")
    return facts


def table(facts: dict[str, Any]) -> str:
    """Render the rows as text."""
    lines = [f"{'what':<52} {'max':>9} {'mean':>9} {'bar':>9}  {'torch':>14} {'ONNX Runtime':>14}"]
    for row in facts["rows"]:
        sides = [
            f"{row[side]['seconds']:.1f} s {row[side]['peak_rss_bytes'] / 1e9:.1f} GB" for side in ("torch", "ort")
        ]
        lines.append(
            f"{row['what']:<52} {row['max_difference']:>9.1e} {row['mean_difference']:>9.1e} {row['bar']:>9.1e}  "
            f"{sides[0]:>14} {sides[1]:>14}"
        )
    return "\n".join(lines)


def numbers(text: str, sign: str, option: str) -> tuple[int, int]:
    """Parse "2+8" or "256x256"."""
    first, found, second = text.partition(sign)
    if not found or not first.isdigit() or not second.isdigit():
        raise UsageError(f"{option} {text}: expected two whole numbers separated by {sign!r}")
    return int(first), int(second)


def with_blocks(variant: Variant, blocks: str) -> Variant:
    """Return a variant with other numbers of double and single blocks and the same widths."""
    double, single = numbers(blocks, "+", "--blocks")
    return replace(variant, transformer=replace(variant.transformer, double_blocks=double, single_blocks=single))


def _write(variant: Variant, folder: Path) -> Path:
    """Write a checkpoint with random weights in transformer and VAE; the text encoder's weights are a hole."""
    sparse.write(variant, folder)
    random = np.random.default_rng(0)
    modules = sparse.modules(variant)
    for part in ("transformer", "vae"):
        for old in (folder / part).glob("*.safetensors*"):
            old.unlink()
        shapes = {name: tuple(tensor.shape) for name, tensor in modules[part].state_dict().items()}
        path = sparse.write_sparse(shapes, folder / part / f"{sparse.STEMS[part]}.safetensors", "F32")
        for tensor in read_header(path).values():
            _fill(tensor, random)
    return folder


def _fill(tensor: StoredTensor, random: np.random.Generator) -> None:
    """Draw a tensor: matrices and kernels that preserve the scale of their inputs, norms around one."""
    if len(tensor.shape) > 1:
        values = random.standard_normal(tensor.shape, np.float32) / np.float32(np.prod(tensor.shape[1:]) ** 0.5)
    elif tensor.name.endswith(("bias", "mean")):
        values = random.standard_normal(tensor.shape, np.float32) / 10
    else:
        values = random.uniform(0.5, 1.5, tensor.shape).astype(np.float32)
    with tensor.file.open("r+b") as stream:
        stream.seek(tensor.offset)
        stream.write(values.tobytes())


def _compare(part: PartName, variant: Variant, checkpoint: Path, size: tuple[int, int]) -> dict[str, Any]:
    """Export one part and run it in both torch and ONNX Runtime."""
    folder = checkpoint.parent
    np.savez(folder / "feeds.npz", **_feeds(part, variant, *size))
    out = folder / "artifact"
    options = ["--parts", part, "--dtype", "fp32", "--json"]
    exported = measure([sys.executable, "-m", "export", "onnx", str(checkpoint), "--out", str(out), *options])
    graph = json.loads((out / "manifest.json").read_text())["parts"][part]["graph"]
    sides, results = {}, {}
    for name, code, first in (("torch", _TORCH, [part, str(checkpoint)]), ("ort", _ORT, [str(out / graph)])):
        result = folder / f"{name}.npy"
        run = measure([sys.executable, "-c", code, *first, str(folder / "feeds.npz"), str(result)])
        sides[name] = {"seconds": round(run.seconds, 1), "peak_rss_bytes": run.peak_rss_bytes}
        results[name] = np.load(result).astype(np.float64)
    scale = 255.0 if part == "vae_decoder" else np.abs(results["torch"]).max()
    difference = np.abs(results["ort"] - results["torch"]) / scale
    sizes = variant.transformer
    blocks = f", {sizes.double_blocks}+{sizes.single_blocks} blocks" if part == "transformer" else ""
    decoder = f", channels {variant.vae.decoder_channels[0]} to {variant.vae.decoder_channels[-1]}"
    return {
        "what": f"klein-4b: {part}{blocks}{decoder if part == 'vae_decoder' else ''}",
        "bar": 1 / 255 if part == "vae_decoder" else BAR,  # bytes: off by one where a value of one half is rounded
        "max_difference": float(difference.max()),
        "mean_difference": float(difference.mean()),
        "equal": float((difference == 0).mean()),
        "scale": float(scale),
        "shape": list(results["torch"].shape),
        "export_seconds": round(exported.seconds, 1),
        **sides,
    }


def _feeds(part: PartName, variant: Variant, height: int, width: int) -> dict[str, Array]:
    """Draw the inputs of a part for one image."""
    random = np.random.default_rng(1)
    h, w = height // variant.pixels_per_token, width // variant.pixels_per_token
    sizes = {"batch": 1, "image_tokens": h * w, "latent_height": h, "latent_width": w}
    shapes = {port.name: port.shape(sizes) for port in ports(part, variant, "fp32").inputs}
    feeds: dict[str, Array] = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    if part == "transformer":
        places = np.zeros((1, h * w, 4), np.int64)
        places[0, :, 1], places[0, :, 2] = np.divmod(np.arange(h * w), w)
        text = np.zeros((1, variant.text_tokens, 4), np.int64)
        text[0, :, 3] = np.arange(variant.text_tokens)
        feeds |= {"img_ids": places, "txt_ids": text, "timestep": np.array([0.7], np.float32)}
    return feeds
