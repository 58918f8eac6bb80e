"""Collect the input of every linear layer and the gradient at its output in one backward pass, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from export.torch_part import TorchPart
from kit.engine import Array

See = Callable[[str, Tensor, Tensor, Tensor], None]  # layer, its weight [N, K], input [B, ..., K], gradient [B, ..., N]


class _Seen(torch.autograd.Function):
    """A linear layer that passes its input and output gradient to a callback in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, weight: Tensor, bias: Tensor | None, see: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.see = see
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.see(weight, x, gradients[0])
        return gradients[0] @ weight if ctx.needs_input_grad[0] else None, None, None, None, None


@contextmanager
def probing(layers: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Within a `with` block, call `see` for each of the layers when a backward pass goes through it.

    No parameter needs a gradient; a scalar that does makes the autograd graph begin at the layers.
    """
    root = torch.zeros((), requires_grad=True)
    apply: Any = _Seen.apply

    def forward(module: Any, shown: Callable[[Tensor, Tensor, Tensor], None], x: Tensor) -> Any:
        return apply(x, root.to(x.device), module.weight, module.bias, shown)

    shown = {module: partial(forward, module, partial(see, name)) for name, module in layers.items()}
    with _replacing(shown):
        yield


@contextmanager
def recomputing(module: nn.Module) -> Iterator[None]:
    """Store only the inputs of each block and recompute the rest in the backward pass: memory is that of one block."""
    blocks: dict[str, Any] = {}
    for name, found in module.named_modules():
        if isinstance(found, nn.ModuleList) and not any(name.startswith(f"{block}.") for block in blocks):
            blocks |= {f"{name}.{place}": block for place, block in found.named_children()}
    again = partial(partial, checkpoint, use_reentrant=False, preserve_rng_state=False)
    with _replacing({block: again(block.forward) for block in blocks.values()}):
        yield


@contextmanager
def _replacing(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules within a `with` block; some already have one on the instance."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, old in before.items():
            if old is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = old


def pull_back(
    part: TorchPart, inputs: Mapping[str, Array], cotangent: Tensor, wanted: tuple[str, ...]
) -> dict[str, Tensor]:
    """Run a part and return the gradients of <output, cotangent> with respect to the wanted inputs, in fp32."""
    given = {port.name: part.tensor(port.name, inputs[port.name]) for port in part.ports.inputs}
    for name in wanted:
        given[name].requires_grad_()
    with torch.enable_grad(), recomputing(part.module):
        output = part.module(**given)
        output.backward(cotangent.to(output.device, output.dtype))
    gradients = {}
    for name in wanted:
        gradient = given[name].grad
        gradients[name] = (torch.zeros_like(given[name]) if gradient is None else gradient).float().cpu()
    return gradients
