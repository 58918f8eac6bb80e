"""What packages of AOTInductor were compiled for, as a file beside them where no manifest is; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit.artifact import Manifest
from kit.errors import ArtifactError

RECORD = "aoti.json"
INDEX = "packages.json"  # of a part: its packages and their sizes
NEEDED = ("device", "gpu", "processor", "torch")  # options of an artifact that decide where it loads


def write_record(path: Path, manifest: Manifest) -> None:
    path.write_text(json.dumps({name: manifest.options[name] for name in NEEDED}, indent=1) + "\n")


def read_record(path: Path) -> Mapping[str, Any]:
    """Read the options beside packages; raises ArtifactError, which names the file."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return {name: found[name] for name in NEEDED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error!r}); write the deployment again") from None


def compiled_sizes(folder: Path, manifest: Manifest) -> tuple[tuple[int, int], ...]:
    """Return the image sizes, width and height, for which an artifact has packages of the transformer and the VAE."""
    variant = manifest.variant
    tokens = {sizes["image_tokens"] for sizes in _buckets(folder / manifest.part("transformer").graph)}
    per = variant.pixels_per_token
    sides = {
        (sizes["latent_width"] * per, sizes["latent_height"] * per)
        for sizes in _buckets(folder / manifest.part("vae_decoder").graph)
    }
    return tuple(sorted(size for size in sides if variant.tokens(*size) in tokens))


def _buckets(index: Path) -> list[dict[str, int]]:
    try:
        return [package["sizes"] for package in json.loads(index.read_text())["packages"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{index}: cannot be read ({error!r}); compile the artifact again") from None
