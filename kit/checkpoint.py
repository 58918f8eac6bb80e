"""From what the user typed to a checkpoint folder in diffusers layout."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kit.errors import CheckpointError, UsageError
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
PART_FOLDERS: Mapping[PartName, str] = {
    "text_encoder": "text_encoder",
    "transformer": "transformer",
    "transformer_extract": "transformer",
    "transformer_cached": "transformer",
    "vae_encoder": "vae",
    "vae_decoder": "vae",
}
WEIGHT_FOLDERS = tuple(sorted(set(PART_FOLDERS.values())))
_TEXT_SUFFIXES = (".json", ".txt", ".jinja", ".model")


def resolve(name: str, weights: tuple[str, ...] = WEIGHT_FOLDERS) -> Path:
    """Return the folder of a checkpoint: in diffusers layout on disk, from the hub, or what ships as `sample`.

    `weights` are the part folders whose weights are needed, so that no more is downloaded for a hub id or the name of
    a published variant. Raises CheckpointError for a file or a folder of another layout, UsageError for what is not
    there.
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
    """Bring a checkpoint from the hub and return its folder in the hub's cache; what is there already stays.

    The single files that lie beside the folders in a published repository are left where they are. Raises UsageError
    in one sentence when the hub cannot be reached, does not know the id or does not grant access.
    """
    from huggingface_hub import errors, snapshot_download

    folders = (*WEIGHT_FOLDERS, "tokenizer", "scheduler")
    wanted = ["model_index.json", *(f"{folder}/*{suffix}" for folder in folders for suffix in _TEXT_SUFFIXES)]
    wanted += [f"{folder}/*.safetensors" for folder in weights]
    http_error, *_ = errors.HfHubHTTPError.__bases__  # of the client behind the hub's library: a broken connection
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
    """Return the trained sample checkpoint, or a tiny random one made on first use where none was shipped."""
    if (SHIPPED / "model_index.json").is_file():
        return SHIPPED
    from kit import tiny  # brings torch and diffusers; only needed to make the stand-in

    folder = cache_folder() / f"tiny-{tiny.REVISION}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = tiny.save(Path(scratch) / "checkpoint")
            try:
                os.rename(made, folder)
            except OSError:
                if not folder.is_dir():  # another process was not faster: a real failure
                    raise
                shutil.rmtree(made)
    return folder


def cache_folder() -> Path:
    """Return where the kit keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flux2-deploy"
