"""Compare a published deployment table with the planner: for which settings each row holds, and where it cannot.

The table (images per minute: A10G 24 GB 2-3, A100 40 GB 8-12, H100 80 GB 20-30, L4 24 GB quantized 4-6; break-even near
50,000 images a month) states neither variant, steps, size nor prices. All settings of a grid are therefore planned; a
row holds for those whose estimate is within its range, and is impossible where even the dense rate is too slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kit.gpus import GPUS
from kit.variants import VARIANTS
from planner.plan import Plan, plan
from planner.prices import HOURS_PER_MONTH, read_prices
from planner.question import Question

STEPS = {
    "klein-4b": (4,),
    "klein-9b": (4,),
    "klein-base-4b": (50, 28),
    "klein-base-9b": (50, 28),
    "dev": (50, 28, 8),
}
SIZES = (512, 768, 1024, 1536, 2048)
BREAK_EVEN = 50_000
NEAR = 0.2  # relative tolerance of the break-even


@dataclass(frozen=True)
class Row:
    """One row of the published table."""

    gpu: str
    low: float
    high: float
    recipes: tuple[str, ...]


ROWS = (
    Row("a10g", 2, 3, ("bf16", "int8", "int4-weights")),
    Row("a100-40g", 8, 12, ("bf16", "int8", "int4-weights")),
    Row("h100", 20, 30, ("bf16", "fp8")),
    Row("l4", 4, 6, ("fp8", "int8", "int4-weights")),
)


def rows() -> list[dict[str, Any]]:
    """Return every row with the settings for which it holds, the result for dev, and the settings that rows share."""
    found: list[dict[str, Any]] = []
    shared: dict[str, list[str]] = {}
    for row in ROWS:
        answers = list(_grid(row))
        holds = [(setting, chosen, _three(p)) for setting, chosen, p in answers if _holds(row, p)]
        for setting in dict.fromkeys(setting for setting, _, _ in holds):
            shared.setdefault(setting, []).append(row.gpu)
        found.append(
            {
                "gpu": row.gpu,
                "published": [row.low, row.high],
                "holds": [{"setting": s, "recipe": r, "per_minute": three} for s, r, three in holds],
                "dev_at_1024": [
                    _verdict(row, setting, chosen, p)
                    for setting, chosen, p in answers
                    if setting.startswith("dev") and setting.endswith("1024x1024")
                ],
            }
        )
    several = {setting: gpus for setting, gpus in shared.items() if len(gpus) > 1}
    most = max((len(gpus) for gpus in several.values()), default=0)
    found.append({"shared_by_most_rows": {s: gpus for s, gpus in several.items() if len(gpus) == most}})
    found.append({"break_even": BREAK_EVEN, "holds": list(_break_even())})
    return found


def table(found: Sequence[dict[str, Any]]) -> list[str]:
    """Render the rows as text."""
    lines = ["published deployment table, and the settings whose estimate is within its range:"]
    for row in found:
        if "gpu" in row:
            low, high = row["published"]
            lines.append(f"{row['gpu']}, {low:g} to {high:g} images per minute:")
            lines += [f"    {h['setting']}, {h['recipe']}: {h['per_minute'][1]:.1f}" for h in row["holds"]]
            for dev in row["dev_at_1024"]:
                lines.append(
                    f"    ({dev['setting']}, {dev['recipe']}: estimate {dev['per_minute'][1]:.2f}, "
                    f"dense rate {dev['ceiling_per_minute']:.2f}: {dev['verdict']})"
                )
        elif "break_even" in row:
            lines.append(f"break-even near {row['break_even']} images per month:")
            lines += [f"    {words}" for words in row["holds"]]
        else:
            lines.append("settings for which most rows hold at once:")
            lines += [f"    {setting}: {', '.join(gpus)}" for setting, gpus in row["shared_by_most_rows"].items()]
    return lines


def _holds(row: Row, answer: Plan) -> bool:
    return answer.per_minute is not None and row.low <= answer.per_minute.mid <= row.high


def _verdict(row: Row, setting: str, chosen: str, answer: Plan) -> dict[str, Any]:
    """Return whether a row can hold for a setting: at the estimate, only at the dense rate, or not at all."""
    assert answer.chosen is not None
    assert answer.chosen.timing is not None
    ceiling = 60 / (answer.chosen.timing.ceiling * answer.question.step_count)
    if _holds(row, answer):
        verdict = "holds"
    elif ceiling < row.low:
        verdict = "impossible as stated"
    else:
        verdict = "not at the estimate"
    return {
        "setting": setting,
        "recipe": chosen,
        "per_minute": _three(answer),
        "ceiling_per_minute": round(ceiling, 2),
        "verdict": verdict,
    }


def _grid(row: Row) -> Iterator[tuple[str, str, Plan]]:
    """Plan every setting of the grid that fits."""
    prices, gpu = read_prices(), GPUS[row.gpu]
    for name, all_steps in STEPS.items():
        for steps in all_steps:
            for size in SIZES:
                for chosen in row.recipes:
                    question = Question(VARIANTS[name], gpu, chosen, width=size, height=size, steps=steps)
                    answer = plan(question, prices)
                    if answer.per_minute is not None:
                        yield f"{name}, {steps} steps, {size}x{size}", chosen, answer


def _break_even() -> Iterator[str]:
    """Yield offers and services for which the monthly rent equals about as many hosted images, if possible."""
    prices = read_prices()
    for row in ROWS:
        for name in ("klein-4b", "klein-9b", "dev"):
            answer = plan(Question(VARIANTS[name], GPUS[row.gpu]), prices)
            if answer.per_minute is None:
                continue
            capacity = answer.per_minute.mid * 60 * HOURS_PER_MONTH
            for offer in prices.gpus[row.gpu]:
                for hosted in prices.hosted[name]:
                    images = offer.usd_per_hour * HOURS_PER_MONTH / hosted.usd_per_megapixel
                    if hosted.steps is None and abs(images / BREAK_EVEN - 1) <= NEAR:
                        can = (
                            "possible"
                            if images <= capacity
                            else f"impossible, the GPU generates at most {capacity:,.0f}"
                        )
                        yield (
                            f"{name} on {row.gpu} at ${offer.usd_per_hour:g} per hour ({offer.offer}) against "
                            f"${hosted.usd_per_megapixel:g} ({hosted.offer}): {images:,.0f}, {can}"
                        )


def _three(answer: Plan) -> list[float]:
    assert answer.per_minute is not None
    return [round(value, 2) for value in (answer.per_minute.low, answer.per_minute.mid, answer.per_minute.high)]
