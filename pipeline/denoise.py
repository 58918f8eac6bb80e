"""The denoising loop as a pure state machine: requests join, advance one step per call in shared batches, and leave.

This module does not depend on Triton. A `LiveRequest` is a request that has been admitted and is not finished;
`Denoiser.step` advances any number of them by one step. Requests with different step counts, seeds, guidance and
arrival times share an engine call if their rows have the same shape; timesteps and position ids are per row.

Reference images are more tokens of the same row, behind those of the image, so a row with references shares calls with
any row of as many tokens. klein-kv reads its references once, before the first step, into keys and values that every
step attends to.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
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
from pipeline.inpainting import Inpainting, steps_skipped
from pipeline.live_request import LiveRequest
from pipeline.noise import initial_latents
from pipeline.position_ids import image_ids, text_ids
from pipeline.references import References
from pipeline.request import Request
from pipeline.store import Store

Float32 = npt.NDArray[np.float32]
logger = logging.getLogger(__name__)


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
    into chunks. `extract` and `cached` are klein-kv's engines for requests with references; `store` keeps the keys and
    values that the former computes.
    """

    variant: Variant
    compute: Compute
    engine: Engine
    max_rows: int = 16
    extract: Engine | None = None
    cached: Engine | None = None
    store: Store | None = None
    occupancy: Occupancy = field(default_factory=Occupancy)
    _constants: dict[Chunk, dict[str, Array]] = field(default_factory=dict)

    def admit(
        self,
        request: Request,
        prompt_embeds: Array,
        negative_embeds: Array | None = None,
        references: References | None = None,
        inpainting: Inpainting | None = None,
        memory: Mapping[str, Array] | None = None,
        memory_key: str = "",
    ) -> LiveRequest:
        """Start a checked request; embeddings are [T, 3H].

        Of klein-kv, `memory` holds the keys and values of its references where they are known; otherwise `read`
        computes them before the first step, and the store keeps them under `memory_key` if there is one.

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
        noise = initial_latents(
            self.variant, request.seed, request.num_images, request.width, request.height, self.compute
        )
        latents = noise
        if inpainting is not None:
            levels = levels[steps_skipped(request.steps, request.strength) :]
            latents = inpainting.noised(noise, levels[0])
        unread = None
        if references is not None and self.extract is not None:
            unread, references = references, None
        return LiveRequest(
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_embeds=negative_embeds if two_passes else None,
            img_ids=image_ids(rows, columns),
            rows=rows,
            columns=columns,
            guidance=request.guidance,
            levels=levels,
            times=schedule.timesteps(levels, self.compute),
            references=references,
            unread=unread,
            memory=memory,
            memory_key=memory_key,
            inpainting=inpainting,
            noise=None if inpainting is None else noise,
        )

    def read(self, live: LiveRequest) -> bool:
        """Give a request of klein-kv the keys and values of its references; returns whether its engine ran for that.

        A request whose references cannot be read gets an `error`.
        """
        references, extract = live.unread, self.extract
        if references is None or extract is None:
            return False
        live.memory = (
            self.store.get(live.memory_key, again=True) if self.store is not None and live.memory_key else None
        )
        if is_new := live.memory is None:
            latents = references.latents[None].astype(numpy_type(self.compute), copy=False)
            try:
                live.memory = extract.run({"ref_hidden_states": latents, "ref_ids": references.ids[None]})
            except EngineError as error:
                logger.error("the references of a request could not be read: %s", error)
                live.error = str(error)
                return True
            if self.store is not None and live.memory_key:
                self.store.put(live.memory_key, live.memory)
        live.unread = None
        return is_new

    def step(self, live: Sequence[LiveRequest]) -> None:
        """Advance every request by one step; requests with rows of the same shape share engine calls.

        Only a request that fails in a call of its own gets an `error`; the others advance.
        """
        for request in live:
            self.read(request)
        live = [request for request in live if request.error is None]
        shape = attrgetter("shape")
        chunks = [
            chunk for _, group in groupby(sorted(live, key=shape), key=shape) for chunk in self._chunks(list(group))
        ]
        self._constants = {chunk: stacked for chunk, stacked in self._constants.items() if chunk in chunks}
        for chunk in chunks:
            self.call(chunk)

    def call(self, chunk: Chunk) -> None:
        """Advance requests of one shape by one step, in one engine call.

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
        engine = self.engine if chunk[0].memory is None else self.cached
        assert engine is not None  # memory comes from `extract`, which is given together with `cached`
        assert all(request.unread is None for request in chunk)  # `read` comes before the first step
        velocity = engine.run(self._inputs(chunk))["velocity"]  # [B, S + R, 128]
        self.occupancy.calls += 1
        self.occupancy.rows += len(velocity)
        self.occupancy.steps += len(chunk)
        self.occupancy.fullest = max(self.occupancy.fullest, len(chunk))
        start = 0
        for request in chunk:
            own = velocity[start : start + request.batch_rows, : request.latents.shape[1]]
            mine = np.asarray(own, dtype=np.float32)
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
            if request.inpainting is not None and request.noise is not None:
                level = request.levels[request.index]
                request.latents = request.inpainting.blend(request.latents, request.noise, level)

    def _inputs(self, chunk: Chunk) -> dict[str, Array]:
        """Stack the rows of a chunk; a request with guidance has its negative passes first."""
        hidden = [request.row_tokens() for request in chunk for _ in request.passes()]
        times = [request.times[request.index] for request in chunk for _ in range(request.batch_rows)]
        if chunk not in self._constants:
            while len(self._constants) >= (KEPT_CHUNKS if chunk[0].memory is None else 1):  # keys take gigabytes
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
            np.broadcast_to(text, (len(request.latents), *text.shape)) for request in chunk for text in request.passes()
        ]
        ids = [np.broadcast_to(request.row_ids(), (request.batch_rows, request.tokens, 4)) for request in chunk]
        tokens, rows = self.variant.text_tokens, sum(request.batch_rows for request in chunk)
        stacked: dict[str, Array] = {
            "encoder_hidden_states": _joined(embeds),
            "img_ids": _joined(ids),
            "txt_ids": np.broadcast_to(text_ids(tokens), (rows, tokens, 4)).copy(),
        }
        if self.variant.guidance == "embedded":
            scales = [request.guidance for request in chunk for _ in range(request.batch_rows)]
            stacked["guidance"] = np.array(scales, np.float32)
        for name in chunk[0].memory or ():
            repeated = [request.memory[name] for request in chunk if request.memory for _ in range(request.batch_rows)]
            stacked[name] = repeated[0] if len(repeated) == 1 else np.concatenate(repeated)
        for array in stacked.values():
            array.flags.writeable = False
        return stacked

    def _round(self, values: Float32) -> Float32:
        """Round to the compute type, in which diffusers keeps latents between steps."""
        if self.compute == "fp32":
            return values.astype(np.float32, copy=False)
        return values.astype(numpy_type(self.compute)).astype(np.float32)


def _joined(arrays: Sequence[Array]) -> Array:
    """Concatenate rows; those of a single image are not copied, because embeddings are large."""
    return arrays[0] if len(arrays) == 1 and arrays[0].flags.c_contiguous else np.concatenate(arrays)
