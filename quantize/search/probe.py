"""See the input of every linear layer beside the gradient at its output, in one backward pass and in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from quantize.torch_part import TorchPart
from serve.engine import Array

See = Callable[[str, Tensor, Tensor], None]  # layer, input [B, ..., K], gradient at the output [B, ..., N]


class _Seen(torch.autograd.Function):
    """A linear layer that shows its input and the gradient when the backward pass comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, root: Tensor, weight: Tensor, bias: Tensor | None, see: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.see = see
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.see(x, gradients[0])
        return gradients[0] @ weight if ctx.needs_input_grad[0] else None, None, None, None, None


@contextmanager
def probing(layers: Mapping[str, nn.Module], see: See) -> Iterator[None]:
    """Call `see` for each of the layers whenever a backward pass goes through it, for the length of a block.

    No parameter needs a gradient; a root of no size that does makes the graph begin at the layers themselves.
    """
    root = torch.zeros((), requires_grad=True)

    def forward(module: Any, shown: Callable[[Tensor, Tensor], None], x: Tensor) -> Any:
        return _Seen.apply(x, root.to(x.device), module.weight, module.bias, shown)

    for name, module in layers.items():
        module.__dict__["forward"] = partial(forward, module, partial(see, name))
    try:
        yield
    finally:
        for module in layers.values():
            module.__dict__.pop("forward")


@contextmanager
def recomputing(module: nn.Module) -> Iterator[None]:
    """Keep what each block takes and compute the rest again in the backward pass: memory is that of one block."""
    blocks = [block for found in module.modules() if isinstance(found, nn.ModuleList) for block in found]
    for block in blocks:
        block.__dict__["forward"] = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for block in blocks:
            block.__dict__.pop("forward")


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
