"""Verify that a running server generates images: request a known one and compare it with that of the deployment.

Triton reports a model as ready once its process has loaded, even if every output is empty (a numpy with another ABI
than the server's python backend causes that) or the model's process has died since. Only a response is proof.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kit.artifact import Manifest, read_manifest, tool_versions
from kit.errors import CheckFailed
from kit.hardware import cpu
from pipeline.images import decode
from pipeline.request import Limits
from serve.client import Client
from serve.settings import Settings

ANSWER = "known_answer.png"
TOLERANCE = 2  # of 255; the order of summation differs between CPUs
SHARE = 0.001  # of the values that may differ at all, on a machine like that which generated the answer
# Negating 100 weights of a block of the sample changes the image by 1 to 22 of 255, in 0.24 to 7 % of its values; more
# steps do not change that. Other numbers of threads change none, the last bit of every weight at most 0.01 %.


def question(limits: Limits) -> Mapping[str, Any]:
    """Return the fields of the known-answer request: the smallest image in one step."""
    width, height = limits.smallest
    return {"prompt": "a red circle", "seed": 7, "width": width, "height": height, "steps": 1}


def probe(client: Client, deployment: Path, timeout: float = 60.0) -> float:
    """Request the known answer of a deployment from its server; returns the elapsed seconds.

    Raises CheckFailed that says what differs: no image, another size, or pixels that differ by more than `TOLERANCE`.
    """
    limits = Settings.read(deployment / "tokenizer" / "1").limits
    images = client.generate(question(limits), timeout=timeout, cache="skip")  # every part has to work
    if len(images.images) != 1 or not images.images[0]:
        raise CheckFailed(
            "the known-answer request returned no image; the numpy of its models may not fit its Python backend: "
            "that of the package index needs numpy < 2"
        )
    generated = decode(images.images[0])
    if not (deployment / ANSWER).is_file():  # written with --known-answer none
        return _look(generated, limits, images.seconds)
    expected = decode((deployment / ANSWER).read_bytes())
    if generated.shape != expected.shape:
        raise CheckFailed(f"the known answer has shape {expected.shape}, the server's image {generated.shape}")
    off = int(np.abs(generated.astype(int) - expected.astype(int)).max())
    if off > TOLERANCE:
        raise CheckFailed(
            f"the server's image differs from the known answer by up to {off} of 255 (allowed: {TOLERANCE})"
        )
    share = float((generated != expected).mean())
    if share > SHARE and made_on(read_manifest(deployment)) == this_kind() != {}:
        raise CheckFailed(
            f"the server's image differs from the known answer in {100 * share:.1f} % of its values (allowed: "
            f"{100 * SHARE:.1f} %, the answer was generated on a machine like this one); were the weights changed?"
        )
    return images.seconds


def this_kind() -> Mapping[str, str]:
    """Return what decides the last bits of an image: the CPU and ONNX Runtime; empty where the CPU has no name."""
    here = cpu()
    if here.name == "unknown":  # all ARM processors
        return {}
    return {"cpu": here.name, "features": " ".join(here.features), **tool_versions("onnxruntime")}


def made_on(manifest: Manifest) -> Mapping[str, str] | None:
    """Return `this_kind` of the machine that generated the known answer; None for plans and packages."""
    kind: Mapping[str, str] | None = manifest.options.get("known_answer")
    return kind


def _look(generated: npt.NDArray[np.uint8], limits: Limits, seconds: float) -> float:
    """Check an image without a known answer: it must have the requested size and more than one color."""
    wanted = (*limits.smallest[::-1], 3)
    if generated.shape != wanted:
        raise CheckFailed(f"an image of shape {wanted} was requested, the server returned {generated.shape}")
    if int(generated.max()) == int(generated.min()):
        raise CheckFailed(f"the image has a single color, {int(generated.max())} of 255; are the weights in the plans?")
    return seconds
