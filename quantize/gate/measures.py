"""Find the measures that are available on this machine, and the reasons why the others are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantize.gate import similarity
from quantize.gate.drawing import Drawing, Measure
from quantize.gate.metrics import LATENT, Score
from quantize.prompt_set import Prompt


@dataclass(frozen=True)
class Scope:
    """What is generated, and the model to measure it with."""

    prompts: Sequence[Prompt]
    width: int
    height: int
    clip: Path | None = None  # a folder with a CLIP model


def likeness(_: Prompt, reference: Drawing, candidate: Drawing) -> dict[str, Score]:
    """Measure how alike two images are, and their latents where both sides have them."""
    scores = {
        "psnr": Score(similarity.psnr(reference.pixels, candidate.pixels)),
        "ssim": Score(similarity.ssim(reference.pixels, candidate.pixels)),
        "flip": Score(similarity.flip(reference.pixels, candidate.pixels)),
        "colour": Score(similarity.colour_shift(reference.pixels, candidate.pixels)),
    }
    if len(reference.latents) and len(candidate.latents):
        scores["latent_cosine"] = Score(min(similarity.cosines(reference.latents, candidate.latents)))
        scores["latent_snr"] = Score(similarity.latent_snr(reference.latents, candidate.latents))
    return scores


def _lpips(_: Scope) -> Measure | str:
    from quantize.gate.learned import lpips_measure

    return lpips_measure()


def _clip(scope: Scope) -> Measure | str:
    from quantize.gate.learned import clip_measure

    return clip_measure(scope.clip)


def _judge(scope: Scope) -> Measure | str:
    from quantize.gate.judging import judge_measure

    return judge_measure(scope.prompts, scope.width, scope.height)


# metrics -> factory of their measure, which returns a sentence instead if it is not available; texts are beside it,
# because they may be read in some scripts only
FACTORIES: Mapping[tuple[str, ...], Callable[[Scope], Measure | str]] = {
    ("psnr", "ssim", "flip", "colour", *LATENT): lambda _: likeness,
    ("lpips",): _lpips,
    ("clip_change",): _clip,
    ("judge_change", "judge_exact_change"): _judge,
}


def available(scope: Scope) -> tuple[list[Measure], dict[str, str]]:
    """Return the available measures, and for every other metric, and script of texts, why it is not available."""
    measures: list[Measure] = []
    reasons: dict[str, str] = {}
    for names, factory in FACTORIES.items():
        made = factory(scope)
        if isinstance(made, str):
            reasons |= dict.fromkeys(names, made)
        else:
            measures.append(made)
    from quantize.gate.reading import reading_measure

    reading, unread = reading_measure(scope.prompts)
    return measures + ([reading] if reading else []), reasons | unread
