"""Parse a quality bound from the command line, for example psnr=45."""

from __future__ import annotations

import math

from kit.errors import UsageError
from quantize.gate.contract import Bound
from quantize.gate.metrics import METRICS


def parse(text: str) -> Bound:
    """Parse METRIC=VALUE; the metric decides whether VALUE is a lower or an upper bound."""
    name, equals, value = text.partition("=")
    if not equals:
        raise UsageError(f"--meet {text!r}: expected METRIC=VALUE, as in psnr=45")
    if name not in METRICS:
        raise UsageError(f"--meet {text}: unknown metric {name!r}; there are: {', '.join(METRICS)}")
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--meet {text}: {value!r} is not a number")
    return Bound(name, number)
