"""Train a model in one stage, with a schedule, a moving average, a loss history and crash-safe checkpoints."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .optimizer import Optimizer
from .recipe import Stage

SAVE_EVERY = 60.0  # seconds between checkpoints
Loss = Callable[[int, torch.Generator], Tensor]
Report = Callable[[str, int, int, float], None]  # stage, step, steps, loss


def rate_at(stage: Stage, step: int) -> float:
    """Return the learning rate: a linear warm-up, then a half cosine to zero."""
    if step < stage.warmup:
        return stage.rate * (step + 1) / stage.warmup
    done = (step - stage.warmup) / max(1, (stage.horizon or stage.steps) - stage.warmup)
    return stage.rate * 0.5 * (1 + math.cos(math.pi * done))


def _write(path: Path, tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Write a checkpoint atomically: a kill leaves either the old or the new one."""
    fresh = path.with_suffix(".part")
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, fresh, metadata=facts)
    os.replace(fresh, path)


def cached(path: Path, make: Callable[[], Tensor]) -> Tensor:
    """Return a tensor from its file, or compute it and save it there."""
    if not path.exists():
        fresh = path.with_suffix(".part")
        save_file({"made": make().contiguous()}, fresh)
        os.replace(fresh, path)
    kept: Tensor = next(iter(load_file(path).values()))
    return kept


class Run:
    """The state of one stage: weights, their moving average, the optimizer's moments, losses and elapsed time."""

    def __init__(self, name: str, stage: Stage, model: nn.Module, folder: Path, seed: int) -> None:
        self.name, self.stage, self.model, self.seed = name, stage, model, seed
        self.path = folder / f"{name}.safetensors"
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.mean = {n: p.detach().clone() for n, p in self.weights.items()}
        self.optimizer = Optimizer(self.weights.items())
        self.step = 0
        self.losses: list[float] = []
        self.seconds = self.cpu_seconds = 0.0
        if self.path.exists():
            self._load()

    def _load(self) -> None:
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
        if facts["steps"] != self.stage.steps or facts["seed"] != self.seed:
            raise ValueError(
                f"{self.path} is from a training of {facts['steps']} steps with seed {facts['seed']}, requested are "
                f"{self.stage.steps} with seed {self.seed}; remove it or choose another --work folder"
            )
        saved = load_file(self.path)
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(saved[f"weight.{name}"])
                self.mean[name].copy_(saved[f"mean.{name}"])
                for kind, moment in self.optimizer.state[name].items():
                    if f"{kind}.{name}" in saved:
                        moment.copy_(saved[f"{kind}.{name}"])
        self.step, self.losses = facts["step"], facts["losses"]
        self.seconds, self.cpu_seconds = facts["seconds"], facts["cpu_seconds"]

    def save(self) -> None:
        """Write everything needed to resume; a finished stage keeps only the averaged weights."""
        tensors = {f"weight.{n}": p for n, p in self.weights.items()} | {f"mean.{n}": p for n, p in self.mean.items()}
        if self.step < self.stage.steps:
            for name, moments in self.optimizer.state.items():
                tensors |= {f"{kind}.{name}": moment for kind, moment in moments.items()}
        facts = {"step": self.step, "steps": self.stage.steps, "seed": self.seed, "losses": self.losses}
        facts |= {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        _write(self.path, tensors, {"facts": json.dumps(facts)})

    def advance(self, loss_at: Loss) -> float:
        """Take one step; its random numbers depend only on seed and step, so a resumed run is reproducible."""
        started, cpu = time.monotonic(), time.process_time()
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        loss = loss_at(self.step, generator)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"stage {self.name}: the loss is {loss.item()} at step {self.step}; lower its learning rate"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
        self.optimizer.step(rate_at(self.stage, self.step), self.step + 1)
        keep = min(self.stage.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.mean[name].lerp_(weight, 1 - keep)
        self.step += 1
        self.losses.append(round(float(loss.detach()), 5))
        self.seconds += time.monotonic() - started
        self.cpu_seconds += time.process_time() - cpu
        return self.losses[-1]


def train(
    name: str, stage: Stage, model: nn.Module, loss_at: Loss, folder: Path, seed: int, report: Report | None = None
) -> Run:
    """Train to the end of the stage, resuming from its checkpoint; the model ends with the averaged weights."""
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(name, stage, model, folder, seed)
    saved = time.monotonic()
    while run.step < stage.steps:
        loss = run.advance(loss_at)
        if report:
            report(name, run.step, stage.steps, loss)
        if run.step == stage.steps or time.monotonic() - saved > SAVE_EVERY:
            run.save()
            saved = time.monotonic()
    with torch.no_grad():
        for key, weight in run.weights.items():
            weight.copy_(run.mean[key])
    return run
