"""How much each group's quantization moves the final latents, from one trajectory there and back per prompt.

Where the backward pass comes by a layer, with its input x and the gradient g, the layer's error dy = Q(x) - x W is
computed as `apply` would cause it, and its share g . dy is added up over tokens, steps, passes and the layers of the
group; squared and averaged over prompts it is the group's effect (see trajectory.py). That weighs an error by where it
goes: an error that later norms, softmaxes or steps wipe out counts little. The error relative to the layer's own output
is kept beside it, for comparison. Errors of different groups add up as if they were independent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from export.weights import Binding
from kit.ports import Compute, PartName
from kit.variants import Variant
from quantize.search.groups import Group, Key
from quantize.search.probe import probing, pull_back
from quantize.search.simulate import Shelf
from quantize.search.trajectory import denoise, go_back
from quantize.torch_part import TorchPart, load
from serve.engine import Array
from serve.prompts import PromptEncoder
from serve.request import Request

Progress = Callable[[str, int, int], None]  # what runs, done, of
State = str  # "quantized", "unsmoothed" or "spared"


@dataclass(frozen=True)
class Effect:
    """What one state of a group does: relative squared errors."""

    final: float  # of the final latents, from this group alone
    local: float  # of the outputs of the group's own layers


@dataclass
class Sums:
    """Running sums over everything that backward passes show, by layer and state."""

    shelves: Mapping[State, Mapping[PartName, Shelf]]
    shares: dict[tuple[PartName, str, State], Tensor] = field(default_factory=dict)  # [rows], of this trajectory
    errors: dict[tuple[PartName, str, State], float] = field(default_factory=lambda: defaultdict(float))
    powers: dict[tuple[PartName, str], float] = field(default_factory=lambda: defaultdict(float))
    weights: Mapping[tuple[PartName, str], Tensor] = field(default_factory=dict)

    def see(self, part: PartName, layer: str, x: Tensor, gradient: Tensor) -> None:
        """Add one call of a layer: x [B, ..., K], gradient [B, ..., N]."""
        exact = x.float() @ self.weights[part, layer].float().T
        self.powers[part, layer] += float(exact.square().sum())
        for state, shelves in self.shelves.items():
            if layer not in shelves[part].changes:
                continue
            error = shelves[part][layer].output(x) - exact
            share = (error * gradient).flatten(1).sum(1, dtype=torch.float64).cpu()
            key = (part, layer, state)
            self.shares[key] = self.shares[key] + share if key in self.shares else share
            self.errors[key] += float(error.square().sum())


@dataclass(frozen=True)
class Model:
    """The high-precision model: what is run, in which type, where."""

    variant: Variant
    bindings: Mapping[PartName, Binding]
    prompts: PromptEncoder
    dtype: Compute | None = None
    device: str = "cpu"

    def load(self, part: PartName) -> TorchPart:
        return load(part, self.variant, self.bindings[part], self.dtype, self.device)


def measure(
    model: Model,
    groups: Mapping[Key, Group],
    shelves: Mapping[State, Mapping[PartName, Shelf]],
    requests: Sequence[Request],
    batch: int = 1,
    seed: int = 0,
    progress: Progress = lambda what, done, of: None,
) -> dict[tuple[Key, State], Effect]:
    """Measure the effect of every group in every state for which `shelves` has its layers."""
    sums = Sums(shelves)
    embeds = _embed(model, requests, progress)
    batches = [requests[begin : begin + batch] for begin in range(0, len(requests), batch)]
    transformer = model.load("transformer")
    watched = _watched(transformer, "transformer", groups)
    sums.weights = {("transformer", name): module.weight.detach() for name, module in watched.items()}
    total = sum(2 * chunk[0].steps for chunk in batches)
    done = 0

    def stepped() -> None:
        nonlocal done
        done += 1
        progress("transformer", done, total)

    paths, backs, shares = [], [], []
    random = torch.Generator().manual_seed(seed)
    for chunk in batches:
        path = denoise(transformer, model.variant, chunk, embeds, stepped)
        cotangent = torch.randn(path.latents.shape, generator=random)
        sums.shares = {}
        with probing(watched, lambda layer, x, g: sums.see("transformer", layer, x, g)):
            _, back = go_back(transformer, path, cotangent, stepped)
        paths.append(path)
        backs.append(back)
        shares.append(sums.shares)
    del transformer, watched
    encoder = model.load("text_encoder")
    watched = _watched(encoder, "text_encoder", groups)
    sums.weights = {("text_encoder", name): module.weight.detach() for name, module in watched.items()}
    for index, (path, back) in enumerate(zip(paths, backs, strict=True)):
        sums.shares = {}
        with probing(watched, lambda layer, x, g: sums.see("text_encoder", layer, x, g)):
            pull_back(encoder, _tokens(model.prompts, path.texts), back, ())
        shares[index] |= sums.shares
        progress("text encoder", index + 1, len(paths))
    found = {}
    for key, group in groups.items():
        for state in shelves:
            if any((key[0], layer, state) not in shares[0] for layer in group.layers):
                continue
            squares: list[Tensor] = []
            for path, here in zip(paths, shares, strict=True):
                rows = sum((here[key[0], layer, state] for layer in group.layers), torch.zeros(()))
                moved = torch.zeros(len(path.latents), dtype=torch.float64).index_add(0, path.owner, rows)
                power = torch.from_numpy(path.latents).double().square().flatten(1).sum(1)
                squares.append(moved.square() / power)
            error = sum(sums.errors[key[0], layer, state] for layer in group.layers)
            power_here = sum(sums.powers[key[0], layer] for layer in group.layers)
            found[key, state] = Effect(float(torch.cat(squares).mean()), error / max(power_here, 1e-30))
    return found


def _watched(part: TorchPart, name: PartName, groups: Mapping[Key, Group]) -> dict[str, torch.nn.Module]:
    wanted = {layer for group in groups.values() if group.part == name for layer in group.layers}
    return {layer: module for layer, module in part.linears().items() if layer in wanted}


def _embed(model: Model, requests: Sequence[Request], progress: Progress) -> dict[str, Array]:
    encoder = model.load("text_encoder")
    texts = sorted({text for request in requests for text in (request.prompt, request.negative_prompt)})
    embeds = {}
    for done, text in enumerate(texts, start=1):
        (embeds[text],) = encoder.run(_tokens(model.prompts, [text]))["prompt_embeds"]
        progress("text encoder", done, len(texts))
    return embeds


def _tokens(prompts: PromptEncoder, texts: Sequence[str]) -> dict[str, Array]:
    import numpy as np

    encoded = [prompts.encode(text) for text in texts]
    return {
        "input_ids": np.stack([tokens.input_ids for tokens in encoded]),
        "attention_mask": np.stack([tokens.attention_mask for tokens in encoded]),
    }
