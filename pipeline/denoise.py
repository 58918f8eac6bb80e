"""The denoising loop as a pure state machine: requests join, advance one step per call in shared batches, and leave.

This module does not depend on Triton. A `LiveRequest` is a request that has been admitted and is not finished;
`Denoiser.step` advances any number of them by one step. Requests with different step counts, seeds, guidance and
arrival times share an engine call if they have the same number of image tokens; timesteps and position ids are per row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter

import numpy as np
import numpy.typing as npt

from kit.dtypes import Compute, numpy_type
from kit.engine import Array, Engine
from kit.errors import EngineError, RequestError
from kit.variants import Variant
from pipeline import schedule
from pipeline.noise import initial_latents
from pipeline.request import Request

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
logger = logging.getLogger(__name__)


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

    @property
    def done(self) -> bool:
        return self.index == len(self.times)

    @property
    def tokens(self) -> int:
        """Image tokens of a row; requests of one engine call have equally many."""
        return int(self.latents.shape[1])

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


Chunk = tuple[LiveRequest, ...]  # the requests of one engine call
KEPT_CHUNKS = 4  # whose stacked inputs are kept between steps


@dataclass
class Occupancy:
    """How full the engine calls were since the start."""

    calls: int = 0
    rows: int = 0
    steps: int = 0  # request-steps: a call that advances three requests adds three
    fullest: int = 0  # the largest number of requests in one call


@dataclass
class Denoiser:
    """Advances requests through one transformer engine.

    `max_rows` limits the rows of one engine call (the largest batch of the engine's profile). Larger groups are split
    into chunks.
    """

    variant: Variant
    compute: Compute
    engine: Engine
    max_rows: int = 16
    occupancy: Occupancy = field(default_factory=Occupancy)
    _constants: dict[Chunk, dict[str, Array]] = field(default_factory=dict)

    def admit(self, request: Request, prompt_embeds: Array, negative_embeds: Array | None = None) -> LiveRequest:
        """Start a checked request; embeddings are [T, 3H].

        Raises RequestError if the embeddings do not have the variant's shape, or if the negative ones are missing and
        guidance needs them.
        """
        text = (self.variant.text_tokens, self.variant.transformer.joint_dim)
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_embeds", negative_embeds)):
            if embeds is not None and embeds.shape != text:
                raise RequestError(f"{name}: shape {list(embeds.shape)} is not {list(text)}")
        two_passes = self.variant.guidance == "cfg" and request.guidance > 1
        if two_passes and negative_embeds is None:
            raise RequestError(f"guidance {request.guidance:g} on {self.variant.name} needs negative_embeds")
        pixels = self.variant.pixels_per_token
        rows, columns = request.height // pixels, request.width // pixels
        levels = schedule.sigmas(rows * columns, request.steps, request.sigmas)
        return LiveRequest(
            latents=initial_latents(
                self.variant, request.seed, request.num_images, request.width, request.height, self.compute
            ),
            prompt_embeds=prompt_embeds,
            negative_embeds=negative_embeds if two_passes else None,
            img_ids=image_ids(rows, columns),
            rows=rows,
            columns=columns,
            guidance=request.guidance,
            levels=levels,
            times=schedule.timesteps(levels, self.compute),
        )

    def step(self, live: Sequence[LiveRequest]) -> None:
        """Advance every request by one step; requests with the same number of image tokens share engine calls.

        Only a request that fails in a call of its own gets an `error`; the others advance.
        """
        tokens = attrgetter("tokens")
        chunks = [
            chunk for _, group in groupby(sorted(live, key=tokens), key=tokens) for chunk in self._chunks(list(group))
        ]
        self._constants = {chunk: stacked for chunk, stacked in self._constants.items() if chunk in chunks}
        for chunk in chunks:
            self.call(chunk)

    def call(self, chunk: Chunk) -> None:
        """Advance requests with equally many image tokens by one step, in one engine call.

        A call that fails, for want of memory perhaps, is tried again with each half of its requests; a request whose
        own call fails gets an `error`, and the others advance.
        """
        try:
            self._advance(chunk)
        except EngineError as error:
            self._constants.pop(chunk, None)
            if len(chunk) == 1:
                logger.error("a request failed: %s", error)
                chunk[0].error = str(error)
                return
            logger.warning("an engine call with %d requests failed, retrying with half: %s", len(chunk), error)
            self.call(chunk[: len(chunk) // 2])
            self.call(chunk[len(chunk) // 2 :])
            return
        if any(request.done for request in chunk):  # the same requests never meet again
            self._constants = {kept: v for kept, v in self._constants.items() if not any(r.done for r in kept)}

    def _chunks(self, live: Sequence[LiveRequest]) -> list[Chunk]:
        chunks: list[list[LiveRequest]] = []
        room = 0
        for request in live:
            if request.batch_rows > room:
                chunks.append([])
                room = max(self.max_rows, request.batch_rows)
            chunks[-1].append(request)
            room -= request.batch_rows
        return [tuple(chunk) for chunk in chunks]

    def _advance(self, chunk: Chunk) -> None:
        velocity = self.engine.run(self._inputs(chunk))["velocity"]  # [B, S, 128]
        self.occupancy.calls += 1
        self.occupancy.rows += len(velocity)
        self.occupancy.steps += len(chunk)
        self.occupancy.fullest = max(self.occupancy.fullest, len(chunk))
        start = 0
        for request in chunk:
            mine = np.asarray(velocity[start : start + request.batch_rows], dtype=np.float32)
            start += request.batch_rows
            if request.negative_embeds is not None:
                negative, positive = mine[: len(request.latents)], mine[len(request.latents) :]
                scaled = self._round(np.float32(request.guidance) * self._round(positive - negative))
                mine = self._round(negative + scaled)
            # Euler step in float32, as in diffusers' scheduler: x + (next sigma - sigma) * v
            step = request.levels[request.index + 1] - request.levels[request.index]
            request.latents = self._round(request.latents + step * mine)
            request.velocity = mine
            request.index += 1

    def _inputs(self, chunk: Chunk) -> dict[str, Array]:
        """Stack the rows of a chunk; a request with guidance has its negative passes first."""
        hidden = [request.latents for request in chunk for _ in _passes(request)]
        times = [request.times[request.index] for request in chunk for _ in range(request.batch_rows)]
        if chunk not in self._constants:
            while len(self._constants) >= KEPT_CHUNKS:
                self._constants.pop(next(iter(self._constants)))
            self._constants[chunk] = self._stack(chunk)
        return {
            "hidden_states": np.concatenate(hidden).astype(numpy_type(self.compute), copy=False),
            "timestep": np.array(times, np.float32),
            **self._constants[chunk],
        }

    def _stack(self, chunk: Chunk) -> dict[str, Array]:
        """Stack the inputs that stay the same at every step.

        The arrays are read-only, so an engine may keep them on its device and skip the upload (see kit.engine).
        """
        embeds = [
            np.broadcast_to(text, (len(request.latents), *text.shape)) for request in chunk for text in _passes(request)
        ]
        ids = [np.broadcast_to(request.img_ids, (request.batch_rows, *request.img_ids.shape)) for request in chunk]
        tokens, rows = self.variant.text_tokens, sum(request.batch_rows for request in chunk)
        stacked: dict[str, Array] = {
            "encoder_hidden_states": np.concatenate(embeds),
            "img_ids": np.concatenate(ids),
            "txt_ids": np.broadcast_to(text_ids(tokens), (rows, tokens, 4)).copy(),
        }
        if self.variant.guidance == "embedded":
            scales = [request.guidance for request in chunk for _ in range(request.batch_rows)]
            stacked["guidance"] = np.array(scales, np.float32)
        for array in stacked.values():
            array.flags.writeable = False
        return stacked

    def _round(self, values: Float32) -> Float32:
        """Round to the compute type, in which diffusers keeps latents between steps."""
        if self.compute == "fp32":
            return values.astype(np.float32, copy=False)
        return values.astype(numpy_type(self.compute)).astype(np.float32)


def _passes(request: LiveRequest) -> list[Array]:
    """Return the text embeddings of each pass: the negative prompt, if any, then the prompt."""
    texts = [request.prompt_embeds]
    return texts if request.negative_embeds is None else [request.negative_embeds, *texts]


def image_ids(rows: int, columns: int) -> Int64:
    """Position ids (t, h, w, l) of an image's tokens, [rows * columns, 4]."""
    ids = np.zeros((rows, columns, 4), np.int64)
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)
    return ids.reshape(-1, 4)


def text_ids(tokens: int) -> Int64:
    """Position ids of text tokens, [tokens, 4]: only the last axis is used."""
    ids = np.zeros((tokens, 4), np.int64)
    ids[:, 3] = np.arange(tokens)
    return ids
