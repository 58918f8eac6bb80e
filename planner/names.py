"""Find the variant that a user names: by its name in any spelling, by a hub id, or by the folder of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from kit.artifact import MANIFEST, read_manifest
from kit.checkpoint import SAMPLE, resolve
from kit.configs import read_variant
from kit.variants import VARIANTS, Variant

_PREFIXES = ("black-forest-labs/", "flux.2-", "flux2-", "flux-2-")


def find_variant(words: str) -> Variant:
    """Return the sizes of a variant; of a checkpoint on a hub, only its configs are downloaded.

    Names are accepted in any case, with the vendor's prefixes and with spaces or underscores: `FLUX.2 klein 4B` is
    klein-4b. Raises UsageError for a name that is unknown, and CheckpointError for a folder that is no checkpoint.
    """
    name = words.strip().lower().replace(" ", "-").replace("_", "-")
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    if name in VARIANTS:
        return VARIANTS[name]
    folder = Path(words).expanduser()
    if (folder / MANIFEST).is_file():
        return read_manifest(folder).variant
    if folder.is_dir():
        return read_variant(folder)
    if "/" in words:
        return read_variant(resolve(words, weights=()))
    if name == SAMPLE:
        return read_variant(resolve(SAMPLE))
    return Variant.named(words)
