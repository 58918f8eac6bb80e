"""The question that a plan answers: what is generated, how, on which GPU and under which load."""

from __future__ import annotations

from dataclasses import dataclass

from kit.gpus import Gpu
from kit.image_size import size_problem
from kit.variants import Variant
from planner.built import Built
from planner.layout import NOT_BUILT, Placement
from planner.memory import REFERENCE_SIDE, Shape, rows
from planner.parts import reads_once, step_part

MAX_STEPS, MAX_BATCH, MAX_REPLICAS = 100, 64, 10_000


@dataclass(frozen=True)
class Question:
    """The question to plan for; the command line reads its defaults from here."""

    variant: Variant
    gpu: Gpu
    recipe: str | None = None  # None: the GPU's recipe, then smaller ones
    text_encoder: Placement | None = None  # None: the planner chooses
    width: int = 1024
    height: int = 1024
    steps: int | None = None  # None: the variant's default
    batch: int = 1
    references: int = 0  # reference images of each image
    gpus: int = 1  # per replica: with two, the text encoder may have its own
    cores: int = 16  # of the host, for a text encoder on the CPU
    rate: float | None = None  # requested images per minute
    p95: float | None = None  # seconds that 95 % of the requests must not exceed at that rate; None: no goal
    replicas: int | None = None  # None: as many as the rate needs
    step_seconds: float | None = None  # measured duration of one step of the batch; None: estimated
    built: Built | None = None  # the engine to plan for; None: one that would be built

    @property
    def roofline(self) -> float | None:
        """The seconds of one step by the layers of the engine, None without one, or at other sizes."""
        if self.built is None:
            return None
        tokens, references = self.variant.tokens(self.width, self.height), self.shape.reference_tokens
        sizes = {"batch": rows(self.variant, self.batch), "image_tokens": tokens + references}
        if reads_once(self.variant, self.references):
            sizes |= {"image_tokens": tokens, "ref_tokens": references}
        return self.built.roofline(step_part(self.variant, self.references), sizes)

    @property
    def shape(self) -> Shape:
        side = min(self.variant.image_size, REFERENCE_SIDE)
        return Shape(self.width, self.height, self.batch, self.references, side)

    @property
    def step_count(self) -> int:
        return self.variant.steps if self.steps is None else self.steps

    @property
    def note(self) -> str | None:
        """Say what is missing for a placement that was asked for; None when the kit can serve it."""
        return NOT_BUILT.get(self.text_encoder) if self.text_encoder else None

    def refusal(self) -> str | None:
        """Return a message for the first value that cannot be planned for, None if all are valid."""
        bounds = (("--steps", self.step_count, MAX_STEPS), ("--batch", self.batch, MAX_BATCH))
        for name, value, most in bounds:
            if not 1 <= value <= most:
                return f"{name} {value}: must be 1 to {most}"
        if not 0 <= self.references <= self.variant.max_references:
            return (
                f"--references {self.references}: {self.variant.name} takes 0 to {self.variant.max_references} "
                "reference images"
            )
        for name, count in (("--gpus", self.gpus), ("--cores", self.cores), ("--replicas", self.replicas)):
            if count is not None and not 1 <= count <= MAX_REPLICAS:
                return f"{name} {count}: must be 1 to {MAX_REPLICAS}"
        if self.rate is not None and not 0 < self.rate <= 1e6:
            return f"--rate {self.rate:g}: must be more than 0 images per minute, and at most 1e6"
        if self.p95 is not None and self.rate is None:
            return f"--p95 {self.p95:g}: waiting times depend on the load; give --rate, the requested images per minute"
        if self.p95 is not None and not 0 < self.p95 <= 1e6:
            return f"--p95 {self.p95:g}: must be more than 0 seconds, and at most 1e6"
        if self.step_seconds is not None and not 0 < self.step_seconds <= 1e4:
            return f"--step-seconds {self.step_seconds:g}: must be more than 0 seconds, and at most 1e4"
        if self.recipe is not None and (refused := self.gpu.refusal(self.recipe)):
            return refused
        return size_problem(self.width, self.height)
