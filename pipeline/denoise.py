"""The step loop as a pure state machine: requests join, advance one step per call in shared batches, and leave.

Nothing here knows Triton. A `LiveRequest` is one request between its first and its last step; `Denoiser.step` advances
any set of them by one step. Requests of different step counts, seeds, guidance and arrival times share an engine call
as long as they have the same number of image tokens; timesteps and position ids travel per row.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import numpy.typing as npt

from kit.dtypes import Compute, numpy_type
from kit.engine import Array, Engine
from kit.errors import EngineError
from kit.variants import Variant
from pipeline import schedule
from pipeline.noise import initial_latents

Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
logger = logging.getLogger(__name__)


@dataclass
class LiveRequest:
    """One request while it is generated."""

    latents: Float32  # [N, S, 128], packed
    prompt_embeds: Array  # [T, 3H]
    negative_embeds: Array | None  # [T, 3H] when classifier-free guidance runs
    img_ids: Int64  # [S, 4]
    rows: int  # of latents: height / 16
    columns: int  # of latents: width / 16
    guidance: float
    levels: Float32  # sigmas, [steps + 1]
    times: Float32  # timestep port, [steps]
    index: int = 0  # steps done
    error: str | None = None  # why it cannot go on

    @property
    def done(self) -> bool:
        return self.index == len(self.times)

    @property
    def batch_rows(self) -> int:
        """Rows that this job takes in an engine call: its images, twice when guidance needs two passes."""
        return len(self.latents) * (1 if self.negative_embeds is None else 2)

    def image_latents(self) -> Float32:
        """Unpack to [N, 128, h, w], what the VAE decoder takes."""
        n, _, channels = self.latents.shape
        return self.latents.transpose(0, 2, 1).reshape(n, channels, self.rows, self.columns)


@dataclass
class Occupancy:
    """How full the engine calls were, counted since start."""

    calls: int = 0
    rows: int = 0
    steps: int = 0  # job-steps: a call that advances three jobs adds three
    fullest: int = 0  # most jobs in one call


@dataclass
class Denoiser:
    """Advances jobs through one transformer engine.

    `max_rows` bounds the rows of one engine call (the largest batch of the engine's profile); a larger group is cut.
    """

    variant: Variant
    compute: Compute
    engine: Engine
    max_rows: int = 16
    occupancy: Occupancy = field(default_factory=Occupancy)
    _constant: dict[int, tuple[tuple[LiveRequest, ...], dict[str, Array]]] = field(
        default_factory=dict
    )  # by image tokens

    def admit(
        self,
        *,
        prompt_embeds: Array,
        negative_embeds: Array | None,
        seed: int,
        width: int,
        height: int,
        steps: int,
        guidance: float,
        num_images: int,
    ) -> LiveRequest:
        """Start a job from checked values; embeddings are [T, 3H].

        Raises ValueError when the embeddings do not have the variant's shape.
        """
        text = (self.variant.text_tokens, self.variant.transformer.joint_dim)
        for name, embeds in (("prompt_embeds", prompt_embeds), ("negative_embeds", negative_embeds)):
            if embeds is not None and embeds.shape != text:
                raise ValueError(f"{name}: shape {list(embeds.shape)} is not {list(text)}")
        two_passes = self.variant.guidance == "cfg" and guidance > 1
        if two_passes and negative_embeds is None:
            raise ValueError(f"guidance {guidance:g} on {self.variant.name} needs negative_embeds")
        rows, columns = height // self.variant.pixels_per_token, width // self.variant.pixels_per_token
        levels = schedule.sigmas(rows * columns, steps)
        return LiveRequest(
            latents=initial_latents(self.variant, seed, num_images, width, height, self.compute),
            prompt_embeds=prompt_embeds,
            negative_embeds=negative_embeds if two_passes else None,
            img_ids=image_ids(rows, columns),
            rows=rows,
            columns=columns,
            guidance=guidance,
            levels=levels,
            times=schedule.timesteps(levels, self.compute),
        )

    def step(self, jobs: Sequence[LiveRequest]) -> None:
        """Advance every job by one step; jobs with the same number of image tokens share engine calls.

        When an engine call fails, its jobs alone carry the `error`; the others advance.
        """
        live = {id(job) for job in jobs}
        self._constant = {t: kept for t, kept in self._constant.items() if all(id(job) in live for job in kept[0])}
        for _, group in groupby(sorted(jobs, key=_tokens), key=_tokens):
            for chunk in self._chunks(list(group)):
                try:
                    self._advance(chunk)
                except EngineError as error:
                    logger.error("an engine call of %d jobs failed: %s", len(chunk), error)
                    for job in chunk:
                        job.error = str(error)

    def _chunks(self, jobs: Sequence[LiveRequest]) -> list[list[LiveRequest]]:
        chunks: list[list[LiveRequest]] = []
        room = 0
        for job in jobs:
            if job.batch_rows > room:
                chunks.append([])
                room = max(self.max_rows, job.batch_rows)
            chunks[-1].append(job)
            room -= job.batch_rows
        return chunks

    def _advance(self, jobs: Sequence[LiveRequest]) -> None:
        velocity = self.engine.run(self._inputs(jobs))["velocity"]  # [B, S, 128]
        self.occupancy.calls += 1
        self.occupancy.rows += len(velocity)
        self.occupancy.steps += len(jobs)
        self.occupancy.fullest = max(self.occupancy.fullest, len(jobs))
        start = 0
        for job in jobs:
            mine = np.asarray(velocity[start : start + job.batch_rows], dtype=np.float32)
            start += job.batch_rows
            if job.negative_embeds is not None:
                negative, positive = mine[: len(job.latents)], mine[len(job.latents) :]
                scaled = self._round(np.float32(job.guidance) * self._round(positive - negative))
                mine = self._round(negative + scaled)
            # Euler: x + (next sigma - sigma) * v in float32, as the scheduler does
            step = job.levels[job.index + 1] - job.levels[job.index]
            job.latents = self._round(job.latents + step * mine)
            job.index += 1

    def _inputs(self, jobs: Sequence[LiveRequest]) -> dict[str, Array]:
        """Stack the rows of all jobs; of a job with guidance first the negative passes, then the positive ones."""
        hidden = [job.latents for job in jobs for _ in _passes(job)]
        times = [job.times[job.index] for job in jobs for _ in range(job.batch_rows)]
        inputs: dict[str, Array] = {
            "hidden_states": np.concatenate(hidden).astype(numpy_type(self.compute), copy=False),
            "timestep": np.array(times, np.float32),
            **self._constants(jobs),
        }
        return inputs

    def _constants(self, jobs: Sequence[LiveRequest]) -> dict[str, Array]:
        """Stack what does not change from step to step, once for a company of jobs.

        The arrays are read-only, by which an engine can tell that they lie on its device already.
        """
        company, stacked = self._constant.get(_tokens(jobs[0]), ((), {}))
        if len(company) == len(jobs) and all(a is b for a, b in zip(company, jobs, strict=True)):
            return stacked
        embeds = [np.broadcast_to(text, (len(job.latents), *text.shape)) for job in jobs for text in _passes(job)]
        ids = [np.broadcast_to(job.img_ids, (job.batch_rows, *job.img_ids.shape)) for job in jobs]
        tokens, rows = self.variant.text_tokens, sum(job.batch_rows for job in jobs)
        stacked = {
            "encoder_hidden_states": np.concatenate(embeds),
            "img_ids": np.concatenate(ids),
            "txt_ids": np.broadcast_to(text_ids(tokens), (rows, tokens, 4)).copy(),
        }
        if self.variant.guidance == "embedded":
            stacked["guidance"] = np.array([job.guidance for job in jobs for _ in range(job.batch_rows)], np.float32)
        for array in stacked.values():
            array.flags.writeable = False
        self._constant[_tokens(jobs[0])] = tuple(jobs), stacked
        return stacked

    def _round(self, values: Float32) -> Float32:
        """Round to the compute type, in which diffusers keeps latents between steps."""
        if self.compute == "fp32":
            return values.astype(np.float32, copy=False)
        return values.astype(numpy_type(self.compute)).astype(np.float32)


def _passes(job: LiveRequest) -> list[Array]:
    """Return the texts that a job runs with, one of them per pass."""
    return [job.prompt_embeds] if job.negative_embeds is None else [job.negative_embeds, job.prompt_embeds]


def _tokens(job: LiveRequest) -> int:
    return int(job.latents.shape[1])


def image_ids(rows: int, columns: int) -> Int64:
    """Position ids (t, h, w, l) of an image's tokens, [rows * columns, 4]."""
    ids = np.zeros((rows, columns, 4), np.int64)
    ids[..., 1] = np.arange(rows)[:, None]
    ids[..., 2] = np.arange(columns)
    return ids.reshape(-1, 4)


def text_ids(tokens: int) -> Int64:
    """Position ids of text tokens, [tokens, 4]: only the last axis counts."""
    ids = np.zeros((tokens, 4), np.int64)
    ids[:, 3] = np.arange(tokens)
    return ids
