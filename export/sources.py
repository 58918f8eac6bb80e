"""Resolve the command line to the folder and single files that an export reads.

A single file holds the weights of one part, or of several (all-in-one files), and nothing else. Sizes, tokenizer,
scheduler and the other parts come from a checkpoint in diffusers layout, which then needs no weights for the part that
the file replaces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from export.single_file import has_decoder_alone
from kit.checkpoint import PART_FOLDERS, resolve
from kit.errors import UsageError
from kit.ports import PartName
from kit.safetensors_file import check_format


@dataclass(frozen=True)
class Sources:
    """A checkpoint folder and, by part folder ("transformer", "vae"), the single files that replace its weights."""

    checkpoint: Path
    single_files: dict[str, Path] = field(default_factory=dict)


def find_sources(
    checkpoint: str,
    parts: Sequence[PartName],
    config: str | None = None,
    transformer: str | None = None,
    vae: str | None = None,
    text_encoder: str | None = None,
) -> Sources:
    """Resolve CHECKPOINT, --config, --transformer, --vae and --text-encoder.

    A CHECKPOINT that is a file is the transformer of the checkpoint given by `config`. From a hub, only the weights of
    exported parts that no single file replaces are downloaded. Raises UsageError for options that contradict each
    other, for a file that replaces a part that is not exported, and for a file that does not exist.
    """
    folder = checkpoint
    if Path(checkpoint).expanduser().is_file():
        check_format(Path(checkpoint).expanduser())
        if transformer is not None:
            raise UsageError(f"{checkpoint} and --transformer {transformer} both give the transformer; pass one")
        if config is None:
            raise UsageError(
                f"{checkpoint} is a single file, which holds the weights of the transformer and nothing else; pass the "
                "folder, hub id or variant that has sizes, tokenizer and the other parts as --config"
            )
        folder, transformer = config, checkpoint
    elif config is not None:
        raise UsageError(f"--config requires a single file; {checkpoint} is not a file")
    given = {"transformer": transformer, "vae": vae, "text_encoder": text_encoder}
    files = {name: Path(file).expanduser() for name, file in given.items() if file}
    needed = {PART_FOLDERS[part] for part in parts}
    for name, file in files.items():
        if not file.is_file():
            raise UsageError(f"--{name.replace('_', '-')} {file} is not a file")
        if name not in needed:
            raise UsageError(f"{file} replaces the {name}, which --parts leaves out")
    replaced = {name for name, file in files.items() if name != "vae" or not has_decoder_alone(file)}
    return Sources(resolve(folder, tuple(sorted(needed - replaced))), files)
