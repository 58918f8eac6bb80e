"""Denoise in high precision and backpropagate through all steps: how the final latents depend on each layer's output.

For a random vector u at the final latents x_T, backpropagation through all steps and the text encoder gives, at the
output y of every layer, the gradient g of <u, x_T>. An error dy of that layer moves the final latents by J dy, and
(g . dy)^2 is an unbiased estimate of |J dy|^2, because E[u u^T] is the identity (Hutchinson, 1990). Since a step is
x' = x + (s' - s) v(x), a cotangent a' after the step becomes a' + (s' - s) (dv/dx)^T a' before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from export.torch_part import TorchPart
from kit.engine import Array
from kit.errors import CheckFailed
from kit.ports import Ports
from kit.variants import Variant
from pipeline.denoise import Denoiser, Float32
from pipeline.live_request import LiveRequest
from pipeline.request import Request
from quantize.search.probe import pull_back


@dataclass
class Recorder:
    """An engine that records its inputs; the denoising loop runs on it."""

    part: TorchPart
    ports: Ports
    calls: list[dict[str, Array]] = field(default_factory=list)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append(dict(inputs))
        return self.part.run(inputs)


@dataclass(frozen=True)
class Trajectory:
    """The trajectory of several requests of one size and step count; rows are those of an engine call."""

    calls: Sequence[Mapping[str, Array]]  # inputs of the transformer at each step
    levels: Float32  # sigmas, [steps + 1]
    owner: Tensor  # [rows], index of the request of each row
    weight: Tensor  # [rows], weight of a row's velocity in the velocity of its request
    texts: Sequence[str]  # [rows]
    latents: Float32  # [requests, S, C], the final ones


def denoise(
    part: TorchPart,
    variant: Variant,
    requests: Sequence[Request],
    embeds: Mapping[str, Array],
    stepped: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Run requests together; raises CheckFailed for values that are not finite."""
    engine = Recorder(part, part.ports)
    denoiser = Denoiser(variant, "fp32", engine, max_rows=2 * len(requests))
    jobs = [
        denoiser.admit(
            request,
            embeds[request.prompt],
            embeds[request.negative_prompt] if variant.guidance == "cfg" else None,
        )
        for request in requests
    ]
    while not jobs[0].done:
        denoiser.step(jobs)
        stepped()
    latents = np.concatenate([job.latents for job in jobs])
    if not np.isfinite(latents).all():
        raise CheckFailed("the high-precision model produced values that are not finite; use --dtype bf16 or fp32")
    owner, weight, texts = _rows(jobs, requests)
    return Trajectory(engine.calls, jobs[0].levels, torch.tensor(owner), torch.tensor(weight), texts, latents)


def _rows(jobs: Sequence[LiveRequest], requests: Sequence[Request]) -> tuple[list[int], list[float], list[str]]:
    """Return owner, weight and text of each row of an engine call; the negative pass of a request comes first."""
    owner, weight, texts = [], [], []
    for index, (job, request) in enumerate(zip(jobs, requests, strict=True)):
        if job.negative_embeds is not None:
            owner.append(index)
            weight.append(1.0 - request.guidance)
            texts.append(request.negative_prompt)
        owner.append(index)
        weight.append(request.guidance if job.negative_embeds is not None else 1.0)
        texts.append(request.prompt)
    return owner, weight, texts


def go_back(
    part: TorchPart, path: Trajectory, cotangent: Tensor, stepped: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Backpropagate a cotangent at the final latents through every step.

    Returns the cotangents at the initial latents [requests, S, C] and at the text embeddings of the rows [rows, T, 3H].
    """
    embeds = torch.zeros(path.calls[0]["encoder_hidden_states"].shape)
    for index in reversed(range(len(path.calls))):
        step = float(path.levels[index + 1] - path.levels[index])
        velocity = step * cotangent[path.owner] * path.weight[:, None, None]  # [rows, S, C]
        found = pull_back(part, path.calls[index], velocity, ("hidden_states", "encoder_hidden_states"))
        cotangent = cotangent.index_add(0, path.owner, found["hidden_states"])
        embeds += found["encoder_hidden_states"]
        stepped()
    return cotangent, embeds
