"""Measure the cost of a full-size export: seconds, peak memory, new bytes on disk, bytes of weights read.

    python -m benchmarks export --variants klein-4b,dev [--naive klein-4b [--naive-blocks 2+8]] [--json]

Checkpoints are sparse files with real names and shapes (see sparse.py). Each export runs in its own process, whose peak
memory the kernel reports, and is then linted for every version of TensorRT. The bytes read of the weight files are
those in the page cache afterwards, except the pages of their headers.

`--naive` also exports the usual way: load the module and pass it to torch.onnx.export, which holds all weights in
memory and writes them again. `--naive-blocks` reduces the number of blocks on both sides where that is too much.
"""

from __future__ import annotations

import argparse
import json
import mmap
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine, residency, sparse
from benchmarks.export_parity import SMALL_DECODER, with_blocks
from benchmarks.measure import measure
from export import node_report
from export.lint.operators import VERSIONS
from kit.checkpoint import PART_FOLDERS
from kit.ports import ALL_PARTS
from kit.variants import Variant

SMALL = "-small-decoder"
_NAIVE = """
import sys, torch
from pathlib import Path
from diffusers import Flux2Transformer2DModel
folder, out = map(Path, sys.argv[1:])
torch.set_default_dtype(torch.bfloat16)
model = Flux2Transformer2DModel.from_pretrained(folder, dtype=torch.bfloat16)
class Plain(torch.nn.Module):
    def __init__(self): super().__init__(); self.model = model
    def forward(self, hidden, text, time, image_ids, text_ids):
        return self.model(hidden, text, time, image_ids, text_ids, return_dict=False)[0]
joint = model.config.joint_attention_dim
ids = lambda n: torch.zeros(1, n, 4, dtype=torch.int64)
args = (torch.zeros(1, 24, 128), torch.zeros(1, 512, joint), torch.zeros(1), ids(24), ids(512))
with torch.no_grad():
    torch.onnx.export(Plain().eval(), args, out / "model.onnx", dynamo=True, opset_version=20, verbose=False)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variants",
        metavar="A,B",
        default="klein-4b,dev",
        help=f"comma-separated, each optionally followed by {SMALL!r}; default: %(default)s",
    )
    parser.add_argument("--parts", metavar="A,B", help="default: all parts of the variant")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"), help="what the graphs compute in")
    parser.add_argument(
        "--naive", metavar="VARIANT", help="also export this variant's transformer the usual way; default: none"
    )
    parser.add_argument(
        "--naive-blocks", metavar="DOUBLE+SINGLE", help="number of its blocks, at their real width; default: all"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns the facts stored in benchmarks/results/export.json."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="flux2-bench-") as scratch:
        for name in filter(None, args.variants.split(",")):
            rows.append(_ours(name, _variant(name), args.parts, args.dtype, Path(scratch)))
        if args.naive:
            variant, what = Variant.named(args.naive), args.naive
            if args.naive_blocks:
                variant, what = with_blocks(variant, args.naive_blocks), f"{what} of {args.naive_blocks} blocks"
            rows.append(_ours(what, variant, "transformer", "bf16", Path(scratch)))
            rows.append(_naive(what, variant, Path(scratch)))
    return {"benchmark": "export", "machine": machine.describe(), "rows": rows}


def _variant(name: str) -> Variant:
    """Look up a variant; the suffix for it selects the published small decoder."""
    variant = Variant.named(name.removesuffix(SMALL))
    return (
        replace(variant, vae=replace(variant.vae, decoder_channels=SMALL_DECODER)) if name.endswith(SMALL) else variant
    )


def table(facts: dict[str, Any]) -> str:
    """Render the rows as text."""
    lines = [f"{'what':<72} {'s':>7} {'CPU s':>7} {'peak MB':>8} {'new MB':>9} {'read of weights':>18}"]
    for row in facts["rows"]:
        size, read = f"{row['weight_bytes'] / 1e9:.1f} GB", row["weight_bytes_read"]
        read = f"all of {size}" if read is None else f"{read / 1e6:.2f} MB of {size}"
        lines.append(
            f"{row['what']:<72} {row['seconds']:>7.1f} {row['cpu_seconds']:>7.1f} {row['peak_rss_bytes'] / 1e6:>8.0f} "
            f"{row['new_bytes'] / 1e6:>9.1f} {read:>18}"
        )
    parts = {part["part"]: part for row in facts["rows"] for part in row.get("parts", ())}
    for name, part in parts.items():
        if part["nodes_exported"]:
            lines += ["", f"{name}, nodes of one block: traced -> exported"]
            lines.append(node_report.table(part["nodes_traced"], part["nodes_exported"]))
    return "\n".join(lines)


def _ours(name: str, variant: Variant, parts: str | None, dtype: str, scratch: Path) -> dict[str, Any]:
    checkpoint = sparse.write(variant, scratch / "checkpoint")
    folders = {PART_FOLDERS[part] for part in ALL_PARTS if parts is None or part in parts.split(",")}
    weights = sorted(path for folder in folders for path in (checkpoint / folder).glob("*.safetensors"))
    for path in weights:
        residency.drop(path)
    before = {path: residency.resident_bytes(path) for path in weights}
    options = ["--dtype", dtype, *(["--parts", parts] if parts else [])]
    out = scratch / "artifact"
    command = [sys.executable, "-m", "export", "onnx", str(checkpoint), "--out", str(out), *options, "--json"]
    run = measure(command)
    read = sum(residency.resident_bytes(path) - before[path] for path in weights)
    headers = sum(_header_bytes(path) for path in weights)
    made = json.loads(run.stdout.splitlines()[-1])["parts"]
    measure([sys.executable, "-m", "export", "lint", str(out)])  # fails if TensorRT would reject a node
    row = {
        "what": f"{name}: {' + '.join(part['part'] for part in made) if parts else 'all parts'}, {dtype}",
        "seconds": round(run.seconds, 1),
        "cpu_seconds": round(run.cpu_seconds, 1),
        "peak_rss_bytes": run.peak_rss_bytes,
        "new_bytes": _new_bytes(out),
        "weight_bytes": sum(path.stat().st_size for path in weights),
        "weight_bytes_read": max(0, read - headers),
        "files": len(weights),
        "lint": f"accepted by TensorRT {', '.join(VERSIONS)}",
        "parts": made,
    }
    _remove(out, checkpoint)
    return row


def _naive(name: str, variant: Variant, scratch: Path) -> dict[str, Any]:
    checkpoint, out = sparse.write(variant, scratch / "checkpoint"), scratch / "naive"
    out.mkdir()
    run = measure([sys.executable, "-c", _NAIVE, str(checkpoint / "transformer"), str(out)])
    row = {
        "what": f"{name}: transformer, bf16, torch.onnx.export of the loaded module",
        "seconds": round(run.seconds, 1),
        "cpu_seconds": round(run.cpu_seconds, 1),
        "peak_rss_bytes": run.peak_rss_bytes,
        "new_bytes": _new_bytes(out),
        "weight_bytes": sum(path.stat().st_size for path in (checkpoint / "transformer").glob("*.safetensors")),
        "weight_bytes_read": None,
    }
    _remove(out, checkpoint)
    return row


def _header_bytes(path: Path) -> int:
    """Return the size of a header, rounded up to whole pages."""
    with path.open("rb") as stream:
        length = 8 + int.from_bytes(stream.read(8), "little")
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def _new_bytes(folder: Path) -> int:
    """Count the bytes of files that are not hard links to files outside the folder, each file once."""
    links: dict[int, int] = {}
    files = {path.stat().st_ino: path.stat() for path in folder.rglob("*") if path.is_file()}
    for path in folder.rglob("*"):
        if path.is_file():
            links[path.stat().st_ino] = links.get(path.stat().st_ino, 0) + 1
    return sum(stat.st_size for inode, stat in files.items() if stat.st_nlink == links[inode])


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)
