"""RoPE without a DOUBLE tensor is as accurate as diffusers' float64 for every possible id of an image or a text."""

from __future__ import annotations

import numpy as np
import torch
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from diffusers.models.embeddings import apply_rotary_emb  # isort: skip

from export.graphs.rotary import angles, rope_of_halves, rope_of_pairs, rotate_halves, rotate_pairs, turns_per_id
from export.graphs.transformer import time_frequencies


def test_angles_are_right_to_two_millionths_for_ids_below_8192() -> None:
    for theta, dim in ((2000, 32), (1e6, 128), (1e9, 128)):
        ids = torch.arange(8192)
        angle = angles(ids.reshape(1, -1, 1), torch.from_numpy(turns_per_id(theta, dim)))[0].double().numpy()
        exact = np.arange(8192)[:, None] * theta ** (-np.arange(0, dim, 2) / dim)
        assert np.abs(angle).max() < 1.5 * 2 * np.pi
        assert np.abs(np.cos(angle) - np.cos(exact)).max() < 2e-6
        assert np.abs(np.sin(angle) - np.sin(exact)).max() < 2e-6


def test_pairs_turn_as_in_diffusers() -> None:
    ids = torch.randint(0, 256, (1, 20, 4), generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, 20, 3, 128, generator=torch.Generator().manual_seed(1))
    rope = rope_of_pairs(angles(ids, torch.from_numpy(turns_per_id(2000, 32))))
    expected = apply_rotary_emb(x, Flux2PosEmbed(2000, [32] * 4)(ids[0]), sequence_dim=1)
    torch.testing.assert_close(rotate_pairs(x, rope), expected, rtol=0, atol=5e-6)


def test_halves_turn_as_in_transformers() -> None:
    x = torch.randn(1, 40, 2, 16, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(40).reshape(1, 40, 1)
    rope = rope_of_halves(angles(positions, torch.from_numpy(turns_per_id(1e6, 16))))
    frequency = 1e6 ** (-torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    angle = (torch.arange(40)[None, :, None] * frequency).repeat(1, 1, 2).float()
    expected, _ = apply_rotary_pos_emb(x, x, angle.cos(), angle.sin(), unsqueeze_dim=2)
    torch.testing.assert_close(rotate_halves(x, rope), expected, rtol=0, atol=5e-6)


def test_time_frequencies_equal_diffusers_to_the_bit() -> None:
    timestep = torch.tensor([907.49, 1.0])
    angle = timestep[:, None] * torch.from_numpy(time_frequencies(256))
    expected = get_timestep_embedding(timestep, 256, flip_sin_to_cos=True, downscale_freq_shift=0)
    assert torch.equal(torch.cat([angle.cos(), angle.sin()], dim=1), expected)
