"""Measure how much the quantization of each group moves the final latents, with one backward pass per prompt.

When the backward pass reaches a layer with input x and gradient g, the layer's error dy = Q(x) - x W is computed with
the codes that `apply` writes, and g . dy is summed over tokens, steps, passes and the layers of the group. Its square,
averaged over prompts, is the effect of the group (see trajectory.py). This weights an error by its consequences: one
that later norms, softmaxes or steps cancel counts little. The error relative to the layer's own output is recorded for
comparison. Errors of different groups are added as if they were independent.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from export.torch_part import TorchPart, load
from export.weights import Binding
from kit.dtypes import Compute
from kit.engine import Array
from kit.ports import PartName
from kit.variants import Variant
from pipeline.prompts import PromptEncoder
from pipeline.request import Request
from quantize.search.groups import Group, Key
from quantize.search.probe import probing, pull_back
from quantize.search.simulate import Shelf
from quantize.search.trajectory import Trajectory, denoise, go_back

Progress = Callable[[str, int, int], None]  # what runs, done, total
State = str  # "quantized", "unsmoothed" or "spared"


@dataclass(frozen=True)
class Effect:
    """The effect of one state of a group, as relative squared errors."""

    final: float  # of the final latents, from this group alone
    local: float  # of the outputs of the group's own layers


@dataclass
class Sums:
    """Running sums of one part over all backward passes, by layer and state."""

    shelves: Mapping[State, Shelf]
    shares: dict[tuple[str, State], Tensor] = field(default_factory=dict)  # [rows] of the current batch
    errors: dict[tuple[str, State], float] = field(default_factory=lambda: defaultdict(float))
    powers: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    def see(self, layer: str, weight: Tensor, x: Tensor, gradient: Tensor) -> None:
        """Add one call of a layer: x [B, ..., K], gradient [B, ..., N]."""
        exact = x.float() @ weight.float().T
        self.powers[layer] += float(exact.square().sum())
        for state, shelf in self.shelves.items():
            if layer not in shelf.changes:
                continue
            error = shelf[layer].output(x) - exact
            share = (error * gradient).flatten(1).sum(1, dtype=torch.float64).cpu()
            key = (layer, state)
            self.shares[key] = self.shares[key] + share if key in self.shares else share
            self.errors[key] += float(error.square().sum())

    def take(self, layers: Iterable[str], state: State) -> Tensor:
        """Return the sum over layers of what they moved in this batch, [rows]."""
        return torch.stack([self.shares[layer, state] for layer in layers]).sum(0)

    def local(self, layers: Sequence[str], state: State) -> float:
        """Return the squared error of the layers' outputs over all batches, relative to the outputs."""
        return sum(self.errors[layer, state] for layer in layers) / max(sum(self.powers[n] for n in layers), 1e-30)


@dataclass(frozen=True)
class Model:
    """The high-precision model, its compute type and its device."""

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
    """Measure the effect of every group in every state that `shelves` has its layers for."""
    embeds = _embed(model, requests, progress)
    batches = [requests[begin : begin + batch] for begin in range(0, len(requests), batch)]
    random = torch.Generator().manual_seed(seed)
    steps = _Steps(sum(2 * chunk[0].steps for chunk in batches), progress)
    sums = {part: Sums({state: of[part] for state, of in shelves.items()}) for part in model.bindings}
    finals: dict[tuple[Key, State], list[Tensor]] = defaultdict(list)
    backs: list[tuple[Trajectory, Tensor]] = []  # gradients at the text embeddings

    def settle(part: PartName, path: Trajectory) -> None:
        """Square the contribution of each group in a batch, relative to the final latents."""
        power = torch.from_numpy(path.latents).double().square().flatten(1).sum(1)  # [requests]
        for key, state in _states(part, groups, shelves):
            rows = sums[part].take(groups[key].layers, state)
            finals[key, state].append(torch.zeros_like(power).index_add(0, path.owner, rows).square() / power)
        sums[part].shares.clear()

    transformer = model.load("transformer")
    watched = _watched(transformer, "transformer", groups)
    for chunk in batches:
        path = denoise(transformer, model.variant, chunk, embeds, steps)
        cotangent = torch.randn(path.latents.shape, generator=random)
        with probing(watched, sums["transformer"].see):
            _, back = go_back(transformer, path, cotangent, steps)
        settle("transformer", path)
        backs.append((replace(path, calls=()), back))
    del transformer, watched
    encoder = model.load("text_encoder")
    watched = _watched(encoder, "text_encoder", groups)
    for done, (path, back) in enumerate(backs if watched else (), start=1):
        with probing(watched, sums["text_encoder"].see):
            pull_back(encoder, _tokens(model.prompts, path.texts), back, ())
        settle("text_encoder", path)
        progress("text encoder", done, len(backs))
    return {
        (key, state): Effect(float(torch.cat(squares).mean()), sums[key[0]].local(groups[key].layers, state))
        for (key, state), squares in finals.items()
    }


@dataclass
class _Steps:
    """Counts the forward and backward steps of all trajectories."""

    total: int
    progress: Progress
    done: int = 0

    def __call__(self) -> None:
        self.done += 1
        self.progress("transformer", self.done, self.total)


def _states(
    part: PartName, groups: Mapping[Key, Group], shelves: Mapping[State, Mapping[PartName, Shelf]]
) -> Iterator[tuple[Key, State]]:
    for key, group in groups.items():
        for state, of in shelves.items():
            if group.part == part and all(layer in of[part].changes for layer in group.layers):
                yield key, state


def _watched(part: TorchPart, name: PartName, groups: Mapping[Key, Group]) -> dict[str, nn.Module]:
    wanted = {layer for group in groups.values() if group.part == name for layer in group.layers}
    return {layer: module for layer, module in part.linears().items() if layer in wanted}


def _embed(model: Model, requests: Sequence[Request], progress: Progress) -> dict[str, Array]:
    encoder = model.load("text_encoder")
    negative = {request.negative_prompt for request in requests} if model.variant.guidance == "cfg" else set()
    texts = sorted(negative | {request.prompt for request in requests})
    embeds = {}
    for done, text in enumerate(texts, start=1):
        (embeds[text],) = encoder.run(_tokens(model.prompts, [text]))["prompt_embeds"]
        progress("text encoder", done, len(texts))
    return embeds


def _tokens(prompts: PromptEncoder, texts: Sequence[str]) -> dict[str, Array]:
    encoded = [prompts.encode(text) for text in texts]
    return {
        "input_ids": np.stack([tokens.input_ids for tokens in encoded]),
        "attention_mask": np.stack([tokens.attention_mask for tokens in encoded]),
    }
