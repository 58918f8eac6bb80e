"""Generate the same prompts and seeds with two artifacts in turn, so that only one set of weights is in memory."""

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
from kit.graph_runtimes import DEFAULT_RUNTIME, GraphRuntime
from quantize.gate.metrics import Score
from quantize.gate.similarity import Pixels, cosines
from quantize.prompt_set import Prompt

SEED_STRIDE = 100_000  # between the seeds of one prompt; no two images share a seed, so none share their noise
Side = Literal["reference", "candidate"]
SIDES: tuple[Side, ...] = get_args(Side)


@dataclass(frozen=True)
class Canvas:
    """Settings of every image; None means the variant's default."""

    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Drawing:
    """One finished image and the latents after each step, [steps, tokens * channels]; no steps if unknown."""

    pixels: Pixels
    latents: npt.NDArray[np.generic]


@dataclass(frozen=True)
class Pair:
    """The scores of one prompt and seed; `cosines` compares the latents at every step."""

    number: int
    prompt: Prompt
    seed: int
    scores: Mapping[str, Score]
    cosines: Sequence[float]

    def image(self, side: Side) -> str:
        """Return the name of the image's file; a prompt's id may contain any character, so it is not used."""
        return f"{self.number:05d}-{side}.png"


Generate = Callable[[str, int], Drawing]
Measure = Callable[[Prompt, Drawing, Drawing], Mapping[str, Score]]  # takes the reference's and the candidate's drawing


def open_generator(
    artifact: Path, canvas: Canvas, threads: int = 0, runtime: GraphRuntime = DEFAULT_RUNTIME
) -> Generate:
    """Load an artifact and return a function that generates a prompt from a seed; the function owns the weights."""
    from pipeline.local import LocalPipeline

    pipeline = LocalPipeline(artifact, threads=threads, runtime=runtime)

    def generate(prompt: str, seed: int) -> Drawing:
        trail: list[npt.NDArray[np.float32]] = []
        fields: dict[str, Any] = {"prompt": prompt, "seed": seed, **asdict(canvas)}
        generated = pipeline.generate(fields, lambda jobs: trail.append(jobs[0].latents.ravel()))
        return Drawing(generated.pixels[0], np.stack(trail))

    return generate


def seeds_of(index: int, count: int) -> list[int]:
    """Return the seeds of the prompt at `index`."""
    return [index + turn * SEED_STRIDE for turn in range(count)]


def compare(
    generators: Mapping[Side, Callable[[], Generate]],
    prompts: Sequence[Prompt],
    seeds: int,
    measures: Sequence[Measure],
    images: Path,
    tick: Callable[[Side], None],
) -> list[Pair]:
    """Generate everything with the reference, then with the candidate, and measure each pair.

    The images stay in the folder `images`; the reference's latents are kept there, in half precision, until their
    pair is measured. Raises CheckFailed for latents that are not finite.
    """
    tasks = [(prompt, seed) for index, prompt in enumerate(prompts) for seed in seeds_of(index, seeds)]
    for number, drawing in _draw(generators["reference"], "reference", tasks, tick):
        _save(drawing, images, number)
    pairs = []
    for number, drawing in _draw(generators["candidate"], "candidate", tasks, tick):
        prompt, seed = tasks[number]
        reference = _load(images, number)
        scores: dict[str, Score] = {}
        for measure in measures:
            scores |= measure(prompt, reference, drawing)
        both = len(reference.latents) and len(drawing.latents)
        pair = Pair(number, prompt, seed, scores, cosines(reference.latents, drawing.latents) if both else ())
        Image.fromarray(drawing.pixels).save(images / pair.image("candidate"))
        pairs.append(pair)
    return pairs


def _draw(
    opened: Callable[[], Generate], side: Side, tasks: Sequence[tuple[Prompt, int]], tick: Callable[[Side], None]
) -> Iterator[tuple[int, Drawing]]:
    generate = opened()
    for number, (prompt, seed) in enumerate(tasks):
        drawing = generate(prompt.text, seed)
        finite = np.isfinite(drawing.latents).all(axis=1)
        if len(finite) and not finite.all():
            raise CheckFailed(
                f"the {side}'s latents are not finite after step {int(finite.argmin()) + 1} of prompt {prompt.id}, "
                f"seed {seed}: its values overflow; keep more layers in high precision"
            )
        yield number, drawing
        tick(side)
    del generate
    gc.collect()  # free the weights before the other artifact is loaded


def _save(drawing: Drawing, images: Path, number: int) -> None:
    Image.fromarray(drawing.pixels).save(images / f"{number:05d}-reference.png")
    np.save(images / f"{number:05d}.npy", drawing.latents.astype(np.float16))


def _load(images: Path, number: int) -> Drawing:
    trail = images / f"{number:05d}.npy"
    latents = np.load(trail, allow_pickle=False)
    trail.unlink()
    return Drawing(np.asarray(Image.open(images / f"{number:05d}-reference.png")), latents)
