"""The kit's own settings of a checkpoint, in a file of its own that diffusers does not read.

Small checkpoints have shorter texts and smaller images than the family. No file of diffusers can say so: its pipelines
pad every text to 512 tokens and generate 1024 pixels a side, whatever the configs of tokenizer and VAE say.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from kit.errors import CheckpointError
from kit.image_size import MAX_SIDE, MIN_SIDE, side_problem
from kit.json_object import read_object
from kit.variants import MAX_TEXT_TOKENS

FILE = "flux2_deploy.json"
IMAGE_SIZE = 1024


@dataclass(frozen=True)
class OwnSettings:
    """What a checkpoint may say beyond its configs."""

    text_tokens: int = MAX_TEXT_TOKENS
    image_size: int = IMAGE_SIZE  # pixels per side if the request gives no size

    def write(self, checkpoint: Path) -> None:
        (checkpoint / FILE).write_text(json.dumps(asdict(self), indent=1) + "\n")


def read_own_settings(checkpoint: Path) -> OwnSettings:
    """Read the settings of a checkpoint, the defaults if it has none; unknown keys are errors."""
    path = checkpoint / FILE
    if not path.is_file():
        return OwnSettings()
    raw = read_object(path)
    known = [field.name for field in fields(OwnSettings)]
    unknown = next((key for key in raw.values if key not in known), None)
    if unknown is not None:
        raise CheckpointError(f"{path}: unknown key {unknown!r}; there are: {', '.join(known)}")
    size = raw.integer("image_size", IMAGE_SIZE)
    if problem := side_problem(size, MIN_SIDE, MAX_SIDE):
        raise CheckpointError(f"{path}: image_size {problem}")
    return OwnSettings(raw.integer("text_tokens", MAX_TEXT_TOKENS, most=MAX_TEXT_TOKENS), size)
