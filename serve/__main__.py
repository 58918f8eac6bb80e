"""Command line: python -m serve."""

from __future__ import annotations

import sys
from functools import partial

from kit import commands

main = partial(commands.main, "serve")

if __name__ == "__main__":
    sys.exit(main())
