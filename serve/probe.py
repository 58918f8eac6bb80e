"""Prove that a running server generates: ask for a known image and compare it with the one the deployment holds.

Triton calls a model ready when its process has loaded, also when every output comes back empty (a numpy with another
ABI than the server's python backend does that) or after a model's process has died. Only an answer proves more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kit.errors import CheckFailed
from pipeline.images import decode
from pipeline.request import Limits
from serve.client import Client
from serve.settings import Settings

ANSWER = "known_answer.png"
TOLERANCE = 2  # of 255; another CPU may sum in another order


def question(limits: Limits) -> Mapping[str, Any]:
    """Return the fields of the known-answer request: the smallest image, one step."""
    return {"prompt": "a red circle", "seed": 7, "width": limits.min_side, "height": limits.min_side, "steps": 1}


def probe(client: Client, deployment: Path, timeout: float = 60.0) -> float:
    """Ask a server for the known answer of its deployment; returns the seconds it took.

    Raises CheckFailed with what differs: no image, another size, or pixels that are off by more than `TOLERANCE`.
    """
    limits = Settings.read(deployment / "tokenizer" / "1").limits
    images = client.generate(question(limits), timeout=timeout)
    if len(images.images) != 1 or not images.images[0]:
        raise CheckFailed("the known-answer request came back without an image; is numpy < 2 where the models run?")
    generated = decode(images.images[0])
    if not (deployment / ANSWER).is_file():  # written with --known-answer none
        return _look(generated, limits, images.seconds)
    expected = decode((deployment / ANSWER).read_bytes())
    if generated.shape != expected.shape:
        raise CheckFailed(f"the known answer has shape {expected.shape}, the server generated {generated.shape}")
    off = int(np.abs(generated.astype(int) - expected.astype(int)).max())
    if off > TOLERANCE:
        raise CheckFailed(f"the server's known answer is off by up to {off} of 255 (allowed: {TOLERANCE})")
    return images.seconds


def _look(generated: npt.NDArray[np.uint8], limits: Limits, seconds: float) -> float:
    """Judge an image that nothing is known of: its size, and that it is not one colour."""
    wanted = (limits.min_side, limits.min_side, 3)
    if generated.shape != wanted:
        raise CheckFailed(f"an image of shape {wanted} was asked for, the server generated {generated.shape}")
    if int(generated.max()) == int(generated.min()):
        raise CheckFailed(f"the image has one colour, {int(generated.max())} of 255: are the weights in the plans?")
    return seconds
