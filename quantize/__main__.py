"""Command line: python -m quantize."""

from __future__ import annotations

import sys
from functools import partial

from kit import commands

main = partial(commands.main, "quantize")

if __name__ == "__main__":
    sys.exit(main())
