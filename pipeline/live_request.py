"""The state of one request while it is denoised: its latents, what they attend to, and how far it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kit.engine import Array
from pipeline.inpainting import Inpainting
from pipeline.references import References

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


@dataclass(eq=False)
class LiveRequest:
    """The state of one request while it is denoised; compared and hashed by identity."""

    latents: Float32  # [N, S, 128], packed
    prompt_embeds: Array  # [T, 3H]
    negative_embeds: Array | None  # [T, 3H] with classifier-free guidance
    img_ids: Int64  # [S, 4]
    rows: int  # latent height: image height / 16
    columns: int  # latent width: image width / 16
    guidance: float
    levels: Float32  # sigmas, [steps + 1]
    times: Float32  # values of the timestep port, [steps]
    index: int = 0  # steps completed
    error: str | None = None  # the failure that ended the request
    velocity: Float32 | None = None  # of the latest step, [N, S, 128]
    references: References | None = None  # tokens that follow the image's in every row
    unread: References | None = None  # klein-kv: references whose keys and values are not computed yet
    memory: Mapping[str, Array] | None = None  # klein-kv: the keys and values of references, each [1, H, R, D]
    memory_key: str = ""  # under which a store keeps them
    inpainting: Inpainting | None = None
    noise: Float32 | None = None  # with inpainting: the seeded noise, [N, S, 128]

    @property
    def done(self) -> bool:
        return self.index == len(self.times)

    @property
    def tokens(self) -> int:
        """Image tokens of a row, references included."""
        return int(self.latents.shape[1]) + (0 if self.references is None else len(self.references.ids))

    @property
    def shape(self) -> tuple[int, int]:
        """What requests of one engine call have in common: tokens of a row, and tokens of cached references."""
        if self.unread is not None:
            return self.tokens, len(self.unread.ids)
        return self.tokens, 0 if self.memory is None else int(next(iter(self.memory.values())).shape[2])

    @property
    def batch_rows(self) -> int:
        """Rows of an engine call that the request needs: one per image, two when guidance needs two passes."""
        return len(self.latents) * (1 if self.negative_embeds is None else 2)

    def image_latents(self) -> Float32:
        """Unpack the latents to [N, 128, h, w], the input of the VAE decoder."""
        return self._unpacked(self.latents)

    def expected_latents(self) -> Float32:
        """Estimate the latents without noise from the latest step: x_t - t v, [N, 128, h, w]."""
        if self.velocity is None:
            return self.image_latents()
        return self._unpacked(self.latents - self.levels[self.index] * self.velocity)

    def _unpacked(self, latents: Float32) -> Float32:
        n, _, channels = latents.shape
        return latents.transpose(0, 2, 1).reshape(n, channels, self.rows, self.columns)

    def row_tokens(self) -> Float32:
        """Return the image tokens of a pass and those of the references behind them, [N, S + R, 128]."""
        if self.references is None:
            return self.latents
        latents = self.references.latents
        repeated = np.broadcast_to(latents, (len(self.latents), *latents.shape))
        return np.concatenate([self.latents, repeated], axis=1)

    def row_ids(self) -> Int64:
        """Return the position ids of a row's tokens, [S + R, 4]."""
        return self.img_ids if self.references is None else np.concatenate([self.img_ids, self.references.ids])

    def passes(self) -> list[Array]:
        """Return the text embeddings of each pass: the negative prompt, if any, then the prompt."""
        return [self.prompt_embeds] if self.negative_embeds is None else [self.negative_embeds, self.prompt_embeds]
