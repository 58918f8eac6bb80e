"""Denoise in high precision, and go the same way back: how the final latents move when any layer's output moves.

For a random vector u at the final latents x_T, going back through all the steps and then through the text encoder
gives, at the output y of every layer, the gradient g of <u, x_T>. An error dy of that layer moves the final latents by
J dy, and (g . dy)^2 is an unbiased estimate of |J dy|^2, because E[u u^T] is the identity (Hutchinson, 1990). Each step
feeds the next: with x' = x + (s' - s) v(x), the cotangent a' after a step is a' + (s' - s) (dv/dx)^T a' before it.
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
from pipeline.denoise import Denoiser, Float32, LiveRequest
from pipeline.request import Request
from quantize.search.probe import pull_back


@dataclass
class Recorder:
    """An engine that keeps what it was asked; the server's own loop runs on it."""

    part: TorchPart
    ports: Ports
    calls: list[dict[str, Array]] = field(default_factory=list)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        self.calls.append(dict(inputs))
        return self.part.run(inputs)


@dataclass(frozen=True)
class Trajectory:
    """Several requests of one size and step count on their way together; rows are those of an engine call."""

    calls: Sequence[Mapping[str, Array]]  # what the transformer took at each step
    levels: Float32  # sigmas, [steps + 1]
    owner: Tensor  # [rows], the request of each row
    weight: Tensor  # [rows], of a row's velocity in its request's
    texts: Sequence[str]  # [rows]
    latents: Float32  # [requests, S, C], the final ones


def denoise(
    part: TorchPart,
    variant: Variant,
    requests: Sequence[Request],
    embeds: Mapping[str, Array],
    stepped: Callable[[], None] = lambda: None,
) -> Trajectory:
    """Run requests together; raises CheckFailed for numbers that are not finite."""
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
        raise CheckFailed("the high-precision model gave numbers that are not finite; use --dtype bf16 or fp32")
    owner, weight, texts = _rows(jobs, requests)
    return Trajectory(engine.calls, jobs[0].levels, torch.tensor(owner), torch.tensor(weight), texts, latents)


def _rows(jobs: Sequence[LiveRequest], requests: Sequence[Request]) -> tuple[list[int], list[float], list[str]]:
    """Say of each row of an engine call whose it is, how it counts, and its text: negative passes come before."""
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
    """Take a cotangent at the final latents back through every step.

    Returns those at the initial latents [requests, S, C] and at the rows' text embeddings [rows, T, 3H].
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
