"""Draw the same prompts and seeds with two artifacts, one after the other: one set of weights in memory at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from kit.errors import CheckFailed
from quantize.gate.metrics import Score
from quantize.gate.similarity import Pixels, cosines
from quantize.prompt_set import Prompt

SEED_STRIDE = 100_000  # between the seeds of one prompt; no two drawings share a seed, so that none share their noise
Side = Literal["reference", "candidate"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Canvas:
    """How every picture is drawn; None is the variant's default."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Drawing:
    """One finished picture and the latents after each step, [steps, tokens * channels]."""

    pixels: Pixels
    latents: npt.NDArray[np.generic]


@dataclass(frozen=True)
class Pair:
    """What the measures say of one prompt and seed; `cosines` are the latents' at every step."""

    number: int
    prompt: Prompt
    seed: int
    scores: Mapping[str, Score]
    cosines: Sequence[float]

    def picture(self, side: Side) -> str:
        """Name the picture's file; a prompt's id may hold anything and names no file."""
        return f"{self.number:05d}-{side}.png"


Paint = Callable[[str, int], Drawing]
Measure = Callable[[Prompt, Drawing, Drawing], Mapping[str, Score]]  # of reference and candidate


def open_painter(artifact: Path, canvas: Canvas, threads: int = 0) -> Paint:
    """Load an artifact; what comes back paints a prompt from a seed, and holds the weights until it is dropped."""
    from pipeline.local import LocalPipeline

    pipeline = LocalPipeline(artifact, threads=threads)

    def paint(prompt: str, seed: int) -> Drawing:
        trail: list[npt.NDArray[np.float32]] = []
        fields: dict[str, Any] = {"prompt": prompt, "seed": seed, **asdict(canvas)}
        painted = pipeline.paint(fields, lambda jobs: trail.append(jobs[0].latents.ravel()))
        return Drawing(painted.pixels[0], np.stack(trail))

    return paint


def seeds_of(index: int, count: int) -> list[int]:
    """Return the seeds of the prompt at `index`."""
    return [index + turn * SEED_STRIDE for turn in range(count)]


def compare(
    painters: Mapping[Side, Callable[[], Paint]],
    prompts: Sequence[Prompt],
    seeds: int,
    measures: Sequence[Measure],
    pictures: Path,
    tick: Callable[[Side], None],
) -> list[Pair]:
    """Draw everything with the reference, then with the candidate, and measure each pair.

    The pictures stay in the folder `pictures`; the reference's latents lie there, in half precision, until their pair
    is measured. Raises CheckFailed for latents that are not finite.
    """
    tasks = [(prompt, seed) for index, prompt in enumerate(prompts) for seed in seeds_of(index, seeds)]
    for number, drawing in _draw(painters["reference"], "reference", tasks, tick):
        _save(drawing, pictures, number)
    pairs = []
    for number, drawing in _draw(painters["candidate"], "candidate", tasks, tick):
        prompt, seed = tasks[number]
        reference = _load(pictures, number)
        scores: dict[str, Score] = {}
        for measure in measures:
            scores |= measure(prompt, reference, drawing)
        pair = Pair(number, prompt, seed, scores, cosines(reference.latents, drawing.latents))
        Image.fromarray(drawing.pixels).save(pictures / pair.picture("candidate"))
        pairs.append(pair)
    return pairs


def _draw(
    opened: Callable[[], Paint], side: Side, tasks: Sequence[tuple[Prompt, int]], tick: Callable[[Side], None]
) -> Iterator[tuple[int, Drawing]]:
    paint = opened()
    for number, (prompt, seed) in enumerate(tasks):
        drawing = paint(prompt.text, seed)
        finite = np.isfinite(drawing.latents).all(axis=1)
        if not finite.all():
            raise CheckFailed(
                f"the {side}'s latents are not finite after step {int(finite.argmin()) + 1} of prompt {prompt.id}, "
                f"seed {seed}: its numbers overflow; keep more layers in high precision"
            )
        yield number, drawing
        tick(side)
    del paint
    gc.collect()  # the weights, before the other artifact's come


def _save(drawing: Drawing, pictures: Path, number: int) -> None:
    Image.fromarray(drawing.pixels).save(pictures / f"{number:05d}-reference.png")
    np.save(pictures / f"{number:05d}.npy", drawing.latents.astype(np.float16))


def _load(pictures: Path, number: int) -> Drawing:
    trail = pictures / f"{number:05d}.npy"
    latents = np.load(trail, allow_pickle=False)
    trail.unlink()
    return Drawing(np.asarray(Image.open(pictures / f"{number:05d}-reference.png")), latents)
