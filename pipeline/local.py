"""The whole pipeline in this process, without a server; the reference for tests and probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kit.artifact import read_manifest
from kit.dtypes import numpy_type
from kit.engine import Array, Engine
from kit.errors import EngineError, RequestError
from kit.graph_runtimes import DEFAULT_RUNTIME, GraphRuntime
from kit.ports import KV_PARTS, SERVED_PARTS, PartName
from pipeline.denoise import Denoiser
from pipeline.inpainting import Inpainting, prepare_image, prepare_mask
from pipeline.live_request import LiveRequest
from pipeline.pictures import decode_rgb
from pipeline.prompts import PromptEncoder
from pipeline.references import References, encode, pack, prepare
from pipeline.request import Limits, Request, check
from runtimes.open import open_parts

StepObserver = Callable[[Sequence[LiveRequest]], None]  # called after every step with the requests it advanced


@dataclass(frozen=True)
class GeneratedImages:
    """The images of one request, uint8 [N, H, W, 3], and the seed that was used."""

    pixels: npt.NDArray[np.uint8]
    seed: int


class LocalPipeline:
    """Runs an artifact for any runtime, or a deployment of ONNX graphs, in this process."""

    def __init__(
        self,
        folder: Path,
        limits: Limits | None = None,
        threads: int = 0,
        runtime: GraphRuntime = DEFAULT_RUNTIME,
    ) -> None:
        """Open the parts; raises UsageError if `runtime` is not installed or cannot run artifacts of this kind."""
        self.folder, self.threads, self.runtime = folder, threads, runtime
        self.manifest = read_manifest(folder)
        self.variant = self.manifest.variant
        self.limits = limits or Limits()
        tokenizer = folder / "tokenizer"
        if self.manifest.kind == "deployment":
            tokenizer = tokenizer / "1" / "tokenizer"
        self.prompts = PromptEncoder(tokenizer, self.variant.text_encoder.kind, self.variant.text_tokens)
        engines = open_parts(folder, self.manifest, SERVED_PARTS, threads, runtime)
        self.text_encoder = engines["text_encoder"]
        self.denoiser = Denoiser(self.variant, self.manifest.compute, engines["transformer"])
        self.vae_decoder = engines["vae_decoder"]
        self._vae_encoder: Engine | None = None  # opened, like klein-kv's graphs, by the first request that edits

    def generate(self, fields: Mapping[str, Any], after_step: StepObserver | None = None) -> GeneratedImages:
        """Generate the images of one request from raw fields; raises RequestError like the server."""
        return self.generate_batch([fields], after_step)[0]

    def generate_batch(
        self, requests: Sequence[Mapping[str, Any]], after_step: StepObserver | None = None
    ) -> list[GeneratedImages]:
        """Generate the images of several requests, step by step in shared batches."""
        checked = [check(fields, self.variant, self.limits) for fields in requests]
        started = [self._start(request) for request in checked]
        while live := [request for request in started if not request.done]:
            self.denoiser.step(live)
            failed = next((request.error for request in live if request.error), None)
            if failed:
                raise EngineError(failed)
            if after_step is not None:
                after_step(live)
        return [
            GeneratedImages(self._decode(live), request.seed) for live, request in zip(started, checked, strict=True)
        ]

    def _decode(self, live: LiveRequest) -> npt.NDArray[np.uint8]:
        latents = live.image_latents().astype(numpy_type(self.manifest.compute), copy=False)
        return self.vae_decoder.run({"latents": latents})["image"].astype(np.uint8)

    def embed(self, text: str, field: str = "prompt") -> Array:
        """Encode one text to [T, 3H]."""
        tokens = self.prompts.encode(text, field)
        inputs = {"input_ids": tokens.input_ids[None], "attention_mask": tokens.attention_mask[None]}
        (embeds,) = self.text_encoder.run(inputs)["prompt_embeds"]
        return np.asarray(embeds)

    def _start(self, request: Request) -> LiveRequest:
        negative = None
        references, inpainting = self._edit(request) if request.images else (None, None)
        if self.variant.guidance == "cfg":
            negative = self.embed(request.negative_prompt, "negative_prompt")
        return self.denoiser.admit(request, self.embed(request.prompt), negative, references, inpainting)

    def _edit(self, request: Request) -> tuple[References, Inpainting | None]:
        """Decode and encode the images of a request."""
        encoder, compute = self._open_edit(), self.manifest.compute
        images = [decode_rgb(image, f"images[{i}]") for i, image in enumerate(request.images)]
        if request.mask is None:
            return pack([encode(prepare(image), encoder, compute) for image in images]), None
        mask = prepare_mask(decode_rgb(request.mask, "mask"), request.width, request.height)
        base = encode(prepare_image(images[0]), encoder, compute)
        references = pack([base, *(encode(prepare(image), encoder, compute) for image in images[1:])])
        return references, Inpainting(pack([base]).latents, mask, compute)

    def _open_edit(self) -> Engine:
        """Open the parts that only edits need; raises RequestError if the artifact lacks one."""
        if self._vae_encoder is None:
            wanted: tuple[PartName, ...] = ("vae_encoder",)
            if self.variant.family == "klein-kv":
                wanted += KV_PARTS
            for part in wanted:
                if part not in self.manifest.parts:
                    raise RequestError(f"images: this artifact has no {part}, so it takes no references; export it")
            engines = open_parts(self.folder, self.manifest, wanted, self.threads, self.runtime)
            self.denoiser.extract, self.denoiser.cached = (engines.get(part) for part in KV_PARTS)
            self._vae_encoder = engines["vae_encoder"]
        return self._vae_encoder
