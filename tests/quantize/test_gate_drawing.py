"""Generating with both artifacts: the same seeds, one set of weights at a time, latents after every step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.engine import Array
from kit.errors import CheckFailed, EngineError
from pipeline.local import LocalPipeline
from quantize.gate.drawing import Canvas, Drawing, Generate, Side, compare, open_generator, seeds_of
from quantize.gate.metrics import Score
from quantize.prompt_set import Prompt

PROMPTS = [Prompt("a", "x", "a dog"), Prompt("b", "x", "a cat")]


class StubGenerator:
    """Generates the seed, plus an offset, in every pixel."""

    def __init__(self, offset: int, latents: tuple[float, ...] = (1.0, 2.0)) -> None:
        self.offset, self.latents = offset, latents
        self.asked: list[tuple[str, int]] = []

    def __call__(self, prompt: str, seed: int) -> Drawing:
        self.asked.append((prompt, seed))
        return Drawing(
            np.full((16, 16, 3), seed % 100 + self.offset, np.uint8), np.array([[v, 1.0] for v in self.latents])
        )


def shift(_: Prompt, reference: Drawing, candidate: Drawing) -> dict[str, Score]:
    return {"shift": Score(float(candidate.pixels.astype(int).mean() - reference.pixels.astype(int).mean()))}


def compared(folder: Path, generators: Mapping[Side, Callable[[], Generate]], ticks: list[Side] | None = None) -> Any:
    return compare(generators, PROMPTS, 2, [shift], folder, (ticks if ticks is not None else []).append)


def test_both_artifacts_use_the_same_prompts_and_seeds_and_no_two_images_share_noise(tmp_path: Path) -> None:
    generators, ticks = {"reference": StubGenerator(0), "candidate": StubGenerator(3)}, list[Side]()
    pairs = compared(tmp_path, {side: lambda p=p: p for side, p in generators.items()}, ticks)  # type: ignore[misc]
    assert generators["reference"].asked == generators["candidate"].asked == [(p.prompt.text, p.seed) for p in pairs]
    assert [(pair.prompt.id, pair.scores["shift"].value) for pair in pairs] == [("a", 3), ("a", 3), ("b", 3), ("b", 3)]
    assert len({pair.seed for pair in pairs}) == 4
    assert ticks == ["reference"] * 4 + ["candidate"] * 4


def test_more_seeds_include_the_seeds_of_fewer() -> None:
    assert seeds_of(5, 3)[:2] == seeds_of(5, 2)


def test_the_reference_is_freed_before_the_candidate_is_loaded(tmp_path: Path) -> None:
    held: list[weakref.ref[StubGenerator]] = []

    def opened() -> StubGenerator:
        assert all(one() is None for one in held)
        generator = StubGenerator(0)
        held.append(weakref.ref(generator))
        return generator

    compared(tmp_path, {"reference": opened, "candidate": opened})
    assert len(held) == 2


def test_images_are_kept_and_latents_are_removed(tmp_path: Path) -> None:
    pairs = compared(tmp_path, {"reference": lambda: StubGenerator(0), "candidate": lambda: StubGenerator(1)})
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {pair.image(side) for pair in pairs for side in ("reference", "candidate")}
    assert pairs[0].cosines == pytest.approx([1, 1])


def test_latents_that_are_not_finite_stop_the_gate_with_step_prompt_and_seed(tmp_path: Path) -> None:
    broken = StubGenerator(0, (1.0, float("nan")))
    with pytest.raises(CheckFailed, match="the candidate's latents are not finite after step 2 of prompt a, seed 0"):
        compared(tmp_path, {"reference": lambda: StubGenerator(0), "candidate": lambda: broken})


def test_a_generator_gives_the_images_of_the_pipeline_and_keeps_every_step(sample_artifact: Path) -> None:
    text, pipeline = "a red circle on a white background", LocalPipeline(sample_artifact)
    drawing = open_generator(sample_artifact, Canvas(steps=3))(text, 7)
    expected = pipeline.generate({"prompt": text, "seed": 7, "steps": 3})
    assert np.array_equal(drawing.pixels, expected.pixels[0])
    assert drawing.latents.shape == (3, 64 * 128)
    decoded = pipeline.vae_decoder.run(
        {"latents": drawing.latents[-1].reshape(1, 64, 128).transpose(0, 2, 1).reshape(1, 128, 8, 8)}
    )
    assert np.array_equal(decoded["image"][0], drawing.pixels)


def test_an_engine_failure_is_reported_as_such(sample_artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = LocalPipeline(sample_artifact)

    def fail(_: Mapping[str, Array]) -> dict[str, Array]:
        raise EngineError("out of memory")

    monkeypatch.setattr(pipeline.denoiser.engine, "run", fail)
    with pytest.raises(EngineError, match="out of memory"):
        pipeline.generate({"prompt": "a red circle on a white background"})
