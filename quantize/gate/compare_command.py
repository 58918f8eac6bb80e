"""Command `quantize compare`: two reports of the gate side by side, such as those of two machines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kit.errors import CheckFailed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Show two gate reports side by side: settings that differ, every metric, and whether the difference of the "
        "PSNR is within the stated tolerance between machines or between sets of calibration prompts."
    )
    parser.add_argument("first", type=Path, metavar="A", help="report.json of `quantize gate --out`, or its folder")
    parser.add_argument("second", type=Path, metavar="B", help="another report, on the same prompts and sizes")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare and print; raises CheckFailed if a tolerance is exceeded."""
    from quantize.gate.side_by_side import compare, read, table

    found = compare(read(args.first), read(args.second))
    facts = {
        "settings": {key: list(both) for key, both in found.settings.items()},
        "metrics": [difference.facts() for difference in found.differences],
        "kept": found.kept,
    }
    if not args.json:
        print(table(found))
    if not found.kept:
        (row,) = (difference for difference in found.differences if not difference.kept)
        causes = f"these settings differ: {', '.join(found.settings)}" if found.settings else "no setting differs"
        far = f"the {row.metric} differs by {abs(row.change):.2f}, more than the tolerance of {row.tolerance:g}"
        raise CheckFailed(f"{far}; {causes}", facts)
    return facts
