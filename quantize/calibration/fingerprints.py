"""Compute fingerprints of a part's weights, the same for a checkpoint and for an artifact exported from it."""

from __future__ import annotations

import hashlib

from export.derived import Derived
from export.weights import Binding
from quantize.calibration.record import PRINT_BYTES, fingerprint


def fingerprints(binding: Binding) -> dict[str, str]:
    """Return the fingerprint of each weight matrix by name; merged weights are computed for it."""
    found = {name: fingerprint(stored) for name, stored in binding.tensors.items() if len(stored.shape) == 2}
    for name, derived in binding.derived.items():
        if len(derived.shape) == 2:
            print_ = hashlib.sha256(f"{list(derived.shape)}{derived.dtype}".encode() + _head(derived))
            found[name] = print_.hexdigest()[:16]
    return found


def _head(derived: Derived) -> bytes:
    """Compute the first bytes of a tensor, as many as a fingerprint covers."""
    head = b""
    for chunk in derived.chunks():
        head += chunk[: PRINT_BYTES - len(head)]
        if len(head) == PRINT_BYTES:
            break
    return head
