"""Command-line entry point: `python -m kit`."""

from __future__ import annotations

import sys
from functools import partial

from kit import commands

main = partial(commands.main, "kit")

if __name__ == "__main__":
    sys.exit(main())
