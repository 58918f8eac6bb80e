"""`quantize merge`: merge several calibration records of one checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kit.outputs import check_out_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="+", type=Path, metavar="FILE", help="what `quantize calibrate` wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the record to write, JSON")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Merge records; raises UsageError for records of different checkpoints, or of the same images."""
    from quantize.calibration import record

    check_out_file(args.out, args.records)
    record.check_replaceable(args.out)
    merged = record.merge([record.read(path) for path in args.records], [str(path) for path in args.records])
    record.write(merged, args.out)
    images = sum(run["prompts"]["count"] * len(run["seeds"]) for run in merged.runs)
    print(f"{args.out}: {merged.variant}, {len(args.records)} records, {images} images")
    return {"out": str(args.out), "variant": merged.variant, "images": images, "digest": merged.digest}
