"""Muon for weight matrices and AdamW for the rest: about twice the progress per step of AdamW alone on these models.

Muon (Keller Jordan, 2024) replaces the momentum of a matrix by the nearest matrix with equal singular values, found by
five Newton-Schulz steps; convolutions are flattened to matrices. The factor 0.2 sqrt(larger side) gives its update the
size of an AdamW update, so that one learning rate works for both (Liu et al., "Muon is scalable for LLM training",
2025).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
BETAS = (0.9, 0.99)
DECAY = 0.01
State = dict[str, Tensor]


def orthogonal(matrix: Tensor, steps: int = 5) -> Tensor:
    """Return an approximation of the nearest matrix whose singular values are all one."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    result: Tensor = x.T if tall else x
    return result


def is_matrix(name: str, weight: Tensor) -> bool:
    """Return whether Muon applies: to a hidden matrix, not to an embedding, an input or output layer or a small one."""
    ends = ("embed", "conv_in", "conv_out", "proj_out", "heads.", "lora_")
    return weight.ndim >= 2 and min(weight.shape[0], weight[0].numel()) >= 16 and not any(end in name for end in ends)


class Optimizer:
    """Both update rules over named weights; ``state`` holds one dict of tensors per weight, ready to be saved."""

    def __init__(self, weights: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.weights = dict(weights)
        self.state: dict[str, State] = {}
        for name, weight in self.weights.items():
            first = {"first": torch.zeros_like(weight)}
            self.state[name] = first if is_matrix(name, weight) else first | {"second": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self, rate: float, count: int) -> None:
        """Update every weight from its gradient and clear the gradient; ``count`` is the number of this step from 1."""
        for name, weight in self.weights.items():
            grad, state = weight.grad, self.state[name]
            if grad is None:
                continue
            weight.mul_(1 - rate * DECAY)
            if "second" in state:
                state["first"].lerp_(grad, 1 - BETAS[0])
                state["second"].lerp_(grad.square(), 1 - BETAS[1])
                mean = state["first"] / (1 - BETAS[0] ** count)
                size = (state["second"] / (1 - BETAS[1] ** count)).sqrt_().add_(1e-8)
                weight.sub_(rate * mean / size)
            else:
                state["first"].lerp_(grad, 1 - MOMENTUM)
                look_ahead = grad.lerp(state["first"], MOMENTUM).flatten(1)
                scale = 0.2 * max(look_ahead.shape) ** 0.5
                weight.sub_((rate * scale) * orthogonal(look_ahead).view_as(weight))
            weight.grad = None
