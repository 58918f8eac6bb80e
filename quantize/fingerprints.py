"""Fingerprints of a part's weights, the same whether they are read from a checkpoint or from an exported artifact."""

from __future__ import annotations

import hashlib

from export.weights import Binding
from quantize.record import PRINT_BYTES, fingerprint


def fingerprints(binding: Binding) -> dict[str, str]:
    """Return the fingerprint of each weight matrix by its name; merged ones are computed."""
    found = {name: fingerprint(stored) for name, stored in binding.tensors.items() if len(stored.shape) == 2}
    for name, derived in binding.derived.items():
        if len(derived.shape) == 2:
            head = next(derived.chunks())[:PRINT_BYTES]
            found[name] = hashlib.sha256(f"{list(derived.shape)}{derived.dtype}".encode() + head).hexdigest()[:16]
    return found
