"""Command-line entry point: `python -m export`."""

from __future__ import annotations

import sys
from functools import partial

from kit import commands

main = partial(commands.main, "export")

if __name__ == "__main__":
    sys.exit(main())
