"""Observe the inputs of linear layers while a torch model runs, with forward hooks that collect statistics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from quantize.calibration.record import PER_OCTAVE, Seen

LOWEST, HIGHEST = -40, 24  # powers of two that bound the histogram


@dataclass
class Watch:
    """Running statistics of one layer's input."""

    rows: int = 0
    amax_by_step: list[float] = field(default_factory=list)
    channel_amax: Tensor | None = None  # [K]
    channel_sum: Tensor | None = None  # [K], of squares, float64
    counts: Tensor | None = None  # histogram of magnitudes
    value_amax: float = 0.0  # of the outputs that attention reads as values

    def see(self, x: Tensor, step: int) -> None:
        """Add an input [..., K]."""
        flat = x.detach().reshape(-1, x.shape[-1]).abs().float()
        largest = flat.amax(0)
        if self.channel_amax is None or self.channel_sum is None or self.counts is None:
            self.channel_amax = torch.zeros_like(largest)
            self.channel_sum = torch.zeros_like(largest, dtype=torch.float64)
            self.counts = torch.zeros((HIGHEST - LOWEST) * PER_OCTAVE, dtype=torch.int64, device=flat.device)
        torch.maximum(self.channel_amax, largest, out=self.channel_amax)
        self.channel_sum += flat.square().sum(0, dtype=torch.float64)
        self.rows += len(flat)
        self.amax_by_step += [0.0] * (step + 1 - len(self.amax_by_step))
        self.amax_by_step[step] = max(self.amax_by_step[step], float(largest.max()))
        bins = flat.log2_().mul_(PER_OCTAVE).floor_().nan_to_num_(nan=0.0, posinf=0.0, neginf=-1e9)
        bins = bins[bins >= LOWEST * PER_OCTAVE].sub_(LOWEST * PER_OCTAVE).clamp_(max=len(self.counts) - 1)
        self.counts += torch.bincount(bins.to(torch.int64), minlength=len(self.counts))

    def seen(self, weight: str) -> Seen:
        """Return the statistics, tied to a weight by its fingerprint."""
        assert self.channel_amax is not None
        assert self.channel_sum is not None
        assert self.counts is not None
        counts = self.counts.cpu().numpy()
        square = (self.channel_sum / self.rows).float().cpu().numpy()
        return Seen(
            rows=self.rows,
            amax=float(self.channel_amax.max()),
            amax_by_step=tuple(self.amax_by_step),
            histogram={int(i) + LOWEST * PER_OCTAVE: int(counts[i]) for i in np.flatnonzero(counts)},
            channel_amax=self.channel_amax.cpu().numpy(),
            channel_square=square,
            weight=weight,
            value_amax=self.value_amax,
        )


class Observer:
    """Observes named linear layers; `step` is the current denoising step."""

    def __init__(self) -> None:
        self.step = 0
        self.watches: dict[str, Watch] = {}

    @contextmanager
    def watching(self, layers: Mapping[str, nn.Module], values: Mapping[str, slice] | None = None) -> Iterator[None]:
        """Hook the layers within a `with` block; `values` are the outputs [..., N] that attention reads as values."""
        handles = [module.register_forward_pre_hook(self._hook(name)) for name, module in layers.items()]
        handles += [
            layers[name].register_forward_hook(self._value_hook(name, rows))
            for name, rows in (values or {}).items()
            if name in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str):  # type: ignore[no-untyped-def]  # torch's type of a hook is a union of six
        watch = self.watches.setdefault(name, Watch())

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            watch.see(args[0], self.step)

        return hook

    def _value_hook(self, name: str, rows: slice):  # type: ignore[no-untyped-def]
        watch = self.watches.setdefault(name, Watch())

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            watch.value_amax = max(watch.value_amax, float(output.detach()[..., rows].abs().max()))

        return hook
