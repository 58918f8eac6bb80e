"""The planner's gain of klein-kv over klein on reference images, against the table that Black Forest Labs published.

None of these figures was used to fit the planner. The source names neither GPU nor software, so the gain is predicted
for eager PyTorch in bf16 on an H100; a GPU that is faster in relation to what does not change has a little less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from kit.gpus import GPUS
from kit.ports import PartName
from kit.recipes import RECIPES
from kit.variants import VARIANTS, Variant
from planner.memory import Shape
from planner.parts import running_parts, step_part
from planner.speed import Calibration
from planner.work import work

SOURCE = "Black Forest Labs, docs/flux2_klein_kv_cache.md: 9B-KV against 9B, references of one megapixel"
SIDES = (512, 768, 1024, 1440)  # of the image, in pixels
PUBLISHED: Mapping[int, tuple[float, ...]] = {  # by number of references
    1: (1.78, 1.57, 1.40, 1.21),
    2: (2.16, 1.97, 1.77, 1.46),
    3: (2.43, 2.21, 1.99, 1.69),
    4: (2.66, 2.44, 2.22, 1.85),
}
GPU, RECIPE = GPUS["h100"], RECIPES["bf16"]


def rows(model: Calibration) -> list[dict[str, Any]]:
    """Return the published and the predicted gain for every number of references and size."""
    plain, cached = VARIANTS["klein-9b"], VARIANTS["klein-9b-kv"]
    found = []
    for references, gains in PUBLISHED.items():
        for side, published in zip(SIDES, gains, strict=True):
            shape = Shape(side, side, references=references)
            predicted = _seconds(plain, shape, model) / _seconds(cached, shape, model)
            found.append(
                {
                    "references": references,
                    "side": side,
                    "published": published,
                    "predicted": round(predicted, 3),
                    "error": round(predicted / published - 1, 4),
                }
            )
    return found


def median_error(found: Sequence[Mapping[str, Any]]) -> float:
    return float(median(abs(row["error"]) for row in found))


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Render one line per number of references."""
    lines = [f"gain of klein-9b-kv over klein-9b, published / predicted for {GPU.name}, by side of the image"]
    for references in PUBLISHED:
        own = [row for row in found if row["references"] == references]
        cells = "   ".join(f"{row['side']}: {row['published']:.2f} / {row['predicted']:.2f}" for row in own)
        lines.append(f"  {references} {'reference ' if references == 1 else 'references'}  {cells}")
    largest = max(abs(row["error"]) for row in found)
    return [*lines, f"  median error {median_error(found):.1%}, largest {largest:.0%}"]


def _seconds(variant: Variant, shape: Shape, model: Calibration) -> float:
    """Predict an image, from prompt to file."""

    def once(part: PartName) -> float:
        own = shape.encoded if part == "vae_encoder" else shape
        return model.seconds(work(part, variant, RECIPE, own), GPU, RECIPE, "eager")

    step = step_part(variant, shape.references)
    return model.outside + sum(
        (variant.steps if part == step else 1) * once(part) for part in running_parts(variant, shape.references)
    )
