"""Modulation of the transformer by timestep and guidance: shifts, scales and gates shared by all blocks of a kind."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

Modulation = tuple[Tensor, Tensor, Tensor]  # shift, 1 + scale, gate, each [B, 1, dim]


class Mods(NamedTuple):
    """The modulation vectors of all blocks and of the last norm."""

    image: list[Modulation]  # double blocks: one for attention, one for the feed-forward
    text: list[Modulation]
    single: Modulation
    out: Tensor  # [B, 2 * dim], scale and shift of the last norm


def modulations(mod: Tensor, sets: int) -> list[Modulation]:
    """Split a modulation [B, sets * 3 * dim] into its sets of shift, scale and gate."""
    thirds = mod.unsqueeze(1).chunk(3 * sets, dim=-1)
    return [(thirds[3 * i], 1 + thirds[3 * i + 1], thirds[3 * i + 2]) for i in range(sets)]
