"""What an export at full size costs: seconds, peak memory, new bytes on disk, bytes of weights read.

    python -m benchmarks export --variants klein-4b,dev [--naive] [--json]

Checkpoints are sparse files of true names and shapes (see sparse.py). Each export runs in a process of its own, whose
peak memory the kernel tells. What was read of the weight files is what lies of them in the page cache afterwards,
beyond the pages of their headers.

`--naive` runs the usual way beside it: build the module with memory behind it and hand it to torch.onnx.export.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine, residency, sparse
from kit.variants import Variant

_NAIVE = """
import sys, torch
from pathlib import Path
from diffusers import Flux2Transformer2DModel
folder, out = map(Path, sys.argv[1:])
torch.set_default_dtype(torch.bfloat16)
model = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(folder)).eval()
class Plain(torch.nn.Module):
    def __init__(self): super().__init__(); self.model = model
    def forward(self, hidden, text, time, image_ids, text_ids):
        return self.model(hidden, text, time, image_ids, text_ids, return_dict=False)[0]
joint = model.config.joint_attention_dim
ids = lambda n: torch.zeros(1, n, 4, dtype=torch.int64)
args = (torch.zeros(1, 24, 128), torch.zeros(1, 512, joint), torch.zeros(1), ids(24), ids(512))
with torch.no_grad():
    torch.onnx.export(Plain(), args, out / "model.onnx", dynamo=True, opset_version=20, verbose=False)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variants", default="klein-4b,dev", help="comma-separated; default: klein-4b,dev")
    parser.add_argument("--parts", default="text_encoder,transformer,vae_encoder,vae_decoder")
    parser.add_argument("--dtype", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--naive", metavar="VARIANT", help="also export this variant's transformer the usual way")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark; returns what stands in benchmarks/results/export.json."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="flux2-bench-") as scratch:
        for name in args.variants.split(","):
            rows.append(_ours(Variant.named(name), args, Path(scratch)))
        if args.naive:
            variant = Variant.named(args.naive)
            only = argparse.Namespace(**{**vars(args), "parts": "transformer"})
            rows.append(_ours(variant, only, Path(scratch)))
            rows.append(_naive(variant, Path(scratch)))
    return {"benchmark": "export", "machine": machine.describe(), "rows": rows}


def table(facts: dict[str, Any]) -> str:
    """Render the rows for people."""
    lines = [f"{'what':<52} {'s':>7} {'peak MB':>8} {'new MB':>9} {'read of weights':>18}"]
    for row in facts["rows"]:
        read = (
            "-"
            if row["weight_bytes_read"] is None
            else f"{row['weight_bytes_read'] / 1e6:.1f} of {row['weight_bytes'] / 1e9:.1f} GB"
        )
        lines.append(
            f"{row['what']:<52} {row['seconds']:>7.1f} {row['peak_rss_bytes'] / 1e6:>8.0f} "
            f"{row['new_bytes'] / 1e6:>9.1f} {read:>18}"
        )
    return "\n".join(lines)


def _ours(variant: Variant, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    checkpoint = sparse.write(variant, scratch / "checkpoint")
    weights = sorted(checkpoint.rglob("*.safetensors"))
    for path in weights:
        residency.drop(path)
    before = {path: residency.resident_bytes(path) for path in weights}
    options = ["--parts", args.parts, "--dtype", args.dtype]
    out = scratch / "artifact"
    command = [sys.executable, "-m", "export", "onnx", str(checkpoint), "--out", str(out), *options, "--json"]
    seconds, peak, text = _measure(command)
    read = sum(residency.resident_bytes(path) - before[path] for path in weights)
    headers = sum(_header_bytes(path) for path in weights)
    row = {
        "what": f"{variant.name}: {args.parts.replace(',', ' + ')}, {args.dtype}",
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak,
        "new_bytes": _new_bytes(out),
        "weight_bytes": sum(path.stat().st_size for path in weights),
        "weight_bytes_read": max(0, read - headers),
        "files": len(weights),
        "parts": json.loads(text.splitlines()[-1])["parts"],
    }
    _remove(out, checkpoint)
    return row


def _naive(variant: Variant, scratch: Path) -> dict[str, Any]:
    checkpoint, out = sparse.write(variant, scratch / "checkpoint"), scratch / "naive"
    out.mkdir()
    seconds, peak, _ = _measure([sys.executable, "-c", _NAIVE, str(checkpoint / "transformer"), str(out)])
    row = {
        "what": f"{variant.name}: transformer, bf16, torch.onnx.export of the loaded module",
        "seconds": round(seconds, 1),
        "peak_rss_bytes": peak,
        "new_bytes": _new_bytes(out),
        "weight_bytes": None,
        "weight_bytes_read": None,
    }
    _remove(out, checkpoint)
    return row


def _measure(command: Sequence[str]) -> tuple[float, int, str]:
    """Run a command; returns its seconds, its peak resident bytes and its stdout; its stderr goes on."""
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, text)
    return seconds, usage.ru_maxrss * 1024, text


def _header_bytes(path: Path) -> int:
    """Return the bytes of a header, up to the end of the page in which it ends."""
    with path.open("rb") as stream:
        length = 8 + int.from_bytes(stream.read(8), "little")
    return -(-length // mmap.PAGESIZE) * mmap.PAGESIZE


def _new_bytes(folder: Path) -> int:
    """Count the bytes of files that are not hard links to something outside the folder, each file once."""
    links: dict[int, int] = {}
    files = {path.stat().st_ino: path.stat() for path in folder.rglob("*") if path.is_file()}
    for path in folder.rglob("*"):
        if path.is_file():
            links[path.stat().st_ino] = links.get(path.stat().st_ino, 0) + 1
    return sum(stat.st_size for inode, stat in files.items() if stat.st_nlink == links[inode])


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)
