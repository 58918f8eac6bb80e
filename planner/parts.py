"""Which parts a request runs through: with reference images also the VAE encoder, and with klein-kv two graphs.

References are more tokens of every step. klein-kv runs them through a graph of their own once, and its steps attend to
the keys and values that it returns.
"""

from __future__ import annotations

from kit.ports import PartName
from kit.variants import Variant

TRANSFORMERS: tuple[PartName, ...] = ("transformer", "transformer_extract", "transformer_cached")


def reads_once(variant: Variant, references: int) -> bool:
    """Return whether references run through a graph of their own once."""
    return variant.family == "klein-kv" and references > 0


def step_part(variant: Variant, references: int) -> PartName:
    """Return the part that a step runs through."""
    return "transformer_cached" if reads_once(variant, references) else "transformer"


def running_parts(variant: Variant, references: int) -> tuple[PartName, ...]:
    """Return the parts that a request runs through, in order."""
    encoder: tuple[PartName, ...] = ("vae_encoder",) if references else ()
    extract: tuple[PartName, ...] = ("transformer_extract",) if reads_once(variant, references) else ()
    return ("text_encoder", *encoder, *extract, step_part(variant, references), "vae_decoder")
