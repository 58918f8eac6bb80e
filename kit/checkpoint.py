"""Resolve the user's checkpoint argument to a folder in diffusers layout."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from kit.errors import CheckpointError, UsageError
from kit.own_settings import FILE as OWN_SETTINGS
from kit.ports import PartName

SAMPLE = "sample"
SHIPPED = Path(__file__).parent / "sample" / "checkpoint"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PUBLISHED: Mapping[str, str] = {
    "dev": "black-forest-labs/FLUX.2-dev",
    "klein-4b": "black-forest-labs/FLUX.2-klein-4B",
    "klein-9b": "black-forest-labs/FLUX.2-klein-9B",
    "klein-9b-kv": "black-forest-labs/FLUX.2-klein-9b-kv",
    "klein-base-4b": "black-forest-labs/FLUX.2-klein-base-4B",
    "klein-base-9b": "black-forest-labs/FLUX.2-klein-base-9B",
}
PartFolder = Literal["transformer", "vae", "text_encoder"]
PART_FOLDERS: Mapping[PartName, PartFolder] = {
    "text_encoder": "text_encoder",
    "transformer": "transformer",
    "transformer_extract": "transformer",
    "transformer_cached": "transformer",
    "vae_encoder": "vae",
    "vae_decoder": "vae",
}
WEIGHT_FOLDERS: tuple[str, ...] = tuple(sorted(set(PART_FOLDERS.values())))
_TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".model")


def resolve(name: str, weights: tuple[str, ...] = WEIGHT_FOLDERS) -> Path:
    """Return the folder of a checkpoint: a folder on disk, a hub id, a published variant or the shipped `sample`.

    `weights` lists the part folders whose weights are needed, so that only these are downloaded from a hub. Raises
    CheckpointError for a file or a folder in another layout, and UsageError if nothing is found.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise CheckpointError(f"{path}: no model_index.json, so it is not a checkpoint in diffusers layout")
        return path.resolve()
    if path.is_file():
        raise CheckpointError(f"{path}: is a file; a checkpoint is a folder in diffusers layout")
    if name == SAMPLE:
        return sample()
    if name in PUBLISHED:
        return download(PUBLISHED[name], weights)
    if _HUB_ID.fullmatch(name) and not path.parent.exists():
        return download(name, weights)
    raise UsageError(
        f"{path} does not exist; give a folder in diffusers layout, a hub id, {SAMPLE!r} or one of: "
        f"{', '.join(PUBLISHED)}"
    )


def download(repository: str, weights: tuple[str, ...]) -> Path:
    """Download a checkpoint from the hub and return its folder in the hub's cache; cached files are kept.

    Single files next to the folders of a published repository are not downloaded. Raises UsageError in one sentence if
    the hub cannot be reached, does not know the id or does not grant access.
    """
    from huggingface_hub import errors, snapshot_download

    folders = (*WEIGHT_FOLDERS, "tokenizer", "scheduler")
    wanted = [
        "model_index.json",
        OWN_SETTINGS,
        *(f"{folder}/*{suffix}" for folder in folders for suffix in _TEXT_SUFFIXES),
    ]
    wanted += [f"{folder}/*.safetensors" for folder in weights]
    http_error, *_ = errors.HfHubHTTPError.__bases__  # base class of the hub's HTTP client errors: a broken connection
    assert issubclass(http_error, Exception)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=wanted))
    except (OSError, errors.HFValidationError, http_error) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"{repository!r} cannot be downloaded from the hub ({type(error).__name__}: {reason}); give a folder in "
            f"diffusers layout or {SAMPLE!r}"
        ) from None
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(f"{repository}: has no model_index.json, so it is not a checkpoint in diffusers layout")
    return folder


def sample() -> Path:
    """Return the trained sample checkpoint, or a tiny random one, created on first use, if none was shipped."""
    if (SHIPPED / "model_index.json").is_file():
        return SHIPPED
    from kit import tiny  # imports torch and diffusers; only needed to create the substitute

    folder = cache_folder() / f"tiny-{tiny.REVISION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = tiny.save(Path(scratch) / "checkpoint")
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.is_dir():  # no other process created it: a real failure
                    raise
                shutil.rmtree(made)
    return folder


def cache_folder() -> Path:
    """Return the folder for files that the kit can recreate."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flux2-deploy"
