"""Run the high-precision model over prompts and all their steps, and record the input statistics of the linear layers.

The text encoder runs over all prompts and is freed before the transformer runs with the step loop of the server, so
only the larger of the two has to fit in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from export.artifact import system_message
from export.lora.merge import record as describe_loras
from export.lora.terms import Lora
from export.torch_part import Offload, TorchPart, bind, check_device, load
from export.weights import Binding
from kit.artifact import tool_versions
from kit.configs import read_variant
from kit.dtypes import Compute
from kit.errors import CheckFailed, UsageError
from kit.ports import QUANTIZED_PARTS, PartName
from kit.variants import Variant
from pipeline.denoise import Denoiser
from pipeline.prompts import PromptEncoder
from pipeline.request import Limits, Request
from pipeline.request import check as check_request
from quantize.attention import values
from quantize.calibration.fingerprints import fingerprints
from quantize.calibration.observe import Observer
from quantize.calibration.record import Record, Seen, check
from quantize.prompt_set import PromptSet


@dataclass(frozen=True)
class Calibration:
    """What to run; None means the variant's default."""

    prompts: PromptSet
    seeds: int = 1  # images per prompt, with seeds 0, 1, ...
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    guidance: float | None = None
    parts: tuple[PartName, ...] = QUANTIZED_PARTS
    dtype: Compute | None = None
    device: str = "cpu"
    offload: Offload = "none"
    loras: tuple[Lora, ...] = ()
    batch: int = 1  # requests per call
    single_files: dict[str, Path] = field(default_factory=dict)
    weights: str | None = None  # the variant of the weight files in folders, such as bf16


Progress = Callable[[str, int, int], None]  # what runs, done, total


def calibrate(checkpoint: Path, config: Calibration, progress: Progress = lambda what, done, of: None) -> Record:
    """Calibrate a checkpoint.

    Raises UsageError for options that contradict each other and prompts that are too long, CheckFailed if the model
    produces values that are not finite.
    """
    check_device(config.device, config.offload)
    variant = read_variant(checkpoint)
    requests = _requests(variant, config)
    bindings = {
        part: bind(part, variant, checkpoint, config.single_files.get(part), config.loras, config.weights)
        for part in QUANTIZED_PARTS
    }
    observer = Observer()
    texts = {request.prompt for request in requests}
    if variant.guidance == "cfg":
        texts |= {request.negative_prompt for request in requests}
    prompts = _prompt_encoder(checkpoint, variant)  # check the length of all of them before the first one runs
    tokens = {text: prompts.encode(text, f"prompt {text[:40]!r}") for text in sorted(texts)}
    embeds: dict[str, Any] = {}
    encoder = load("text_encoder", variant, bindings["text_encoder"], config.dtype, config.device, config.offload)
    watched = encoder.linears() if "text_encoder" in config.parts else {}
    with observer.watching(watched):
        for done, (text, encoded) in enumerate(tokens.items()):
            inputs = {"input_ids": encoded.input_ids[None], "attention_mask": encoded.attention_mask[None]}
            (embeds[text],) = encoder.run(inputs)["prompt_embeds"]
            progress("text encoder", done + 1, len(texts))
    del encoder
    found = {"text_encoder": _seen(observer, bindings["text_encoder"])} if watched else {}
    if "transformer" in config.parts:
        observer = Observer()
        transformer = load("transformer", variant, bindings["transformer"], config.dtype, config.device, config.offload)
        with observer.watching(_blocks(transformer), values(variant.transformer)):
            _denoise(transformer, variant, requests, embeds, observer, config.batch, progress)
        found["transformer"] = _seen(observer, bindings["transformer"])
    for part, layers in found.items():
        for name, seen in layers.items():
            if not np.isfinite(seen.amax):
                check(name, seen, f"the {part}")
    return Record(variant.name, (_describe(config, requests[0]),), found)


def _requests(variant: Variant, config: Calibration) -> list[Request]:
    if not config.prompts.prompts:
        raise UsageError(f"--prompts {config.prompts.spec}: contains no prompts")
    unknown = [part for part in config.parts if part not in QUANTIZED_PARTS]
    if unknown or not config.parts:
        raise UsageError(
            f"--parts: {', '.join(unknown) or 'nothing'} cannot be calibrated; {', '.join(QUANTIZED_PARTS)} can"
        )
    given = {"steps": config.steps, "width": config.width, "height": config.height, "guidance": config.guidance}
    plain = {name: value for name, value in given.items() if value is not None}
    return [
        check_request({"prompt": prompt.text, "seed": seed, **plain}, variant, Limits())
        for prompt in config.prompts.prompts
        for seed in range(config.seeds)
    ]


def _prompt_encoder(checkpoint: Path, variant: Variant) -> PromptEncoder:
    """Read the checkpoint's tokenizer; dev's needs the system message that an export stores with it."""
    kind = variant.text_encoder.kind
    return PromptEncoder(
        checkpoint / "tokenizer", kind, variant.text_tokens, system_message() if kind == "mistral3" else None
    )


def _blocks(transformer: TorchPart) -> dict[str, Any]:
    """Return the linear layers inside the blocks; no recipe quantizes the others."""
    return {name: module for name, module in transformer.linears().items() if "transformer_blocks." in name}


def _denoise(
    transformer: TorchPart,
    variant: Variant,
    requests: Sequence[Request],
    embeds: dict[str, Any],
    observer: Observer,
    batch: int,
    progress: Progress,
) -> None:
    denoiser = Denoiser(variant, "fp32", transformer)
    steps = sum(request.steps for request in requests)
    done = 0
    for begin in range(0, len(requests), batch):
        jobs = [
            denoiser.admit(
                request,
                embeds[request.prompt],
                embeds[request.negative_prompt] if variant.guidance == "cfg" else None,
            )
            for request in requests[begin : begin + batch]
        ]
        while live := [job for job in jobs if not job.done]:
            observer.step = live[0].index
            denoiser.step(live)
            for job in live:
                if job.error or not np.isfinite(job.latents).all():
                    raise CheckFailed(
                        f"step {job.index} produced values that are not finite; calibrate with --dtype bf16 or fp32"
                    )
            done += len(live)
            progress("transformer", done, steps)


def _seen(observer: Observer, binding: Binding) -> dict[str, Seen]:
    prints = fingerprints(binding)
    return {name: watch.seen(prints[f"{name}.weight"]) for name, watch in observer.watches.items() if watch.rows}


def _describe(config: Calibration, request: Request) -> dict[str, Any]:
    return {
        "prompts": {
            "spec": config.prompts.spec,
            "digest": config.prompts.digest,
            "count": len(config.prompts.prompts),
            "marks": [prompt.mark for prompt in config.prompts.prompts],
        },
        "seeds": list(range(config.seeds)),
        "steps": request.steps,
        "width": request.width,
        "height": request.height,
        "guidance": request.guidance,
        "dtype": config.dtype or "as stored",
        "device": config.device,
        "loras": describe_loras(config.loras),
        "versions": tool_versions("torch", "transformers", "diffusers"),
    }
