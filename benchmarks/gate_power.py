"""Measure what the quality gate can catch: null runs, which it should pass, and planted faults, which it should not.

    python -m benchmarks gate --work build/gate-power --save benchmarks/results/gate_power.json

Null runs are a recipe's own artifact with other numbers of threads, and artifacts calibrated on other prompts, each
against the fp32 artifact. A gate is repeated on random subsets of their prompts: the share of broken contracts is the
false-alarm rate (benchmarks/null_gates.py). Faults are planted into the artifact's weights or into its images
(benchmarks/planted.py). Images are kept in the work folder, so that other bounds can be judged without drawing again.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.null_gates import GATES, MOST_ALARMS, broken_gates, by_prompts, judge, least_prompts
from benchmarks.planted import IMAGE_FAULTS, WEIGHT_FAULTS, one_layer_at_4_bits
from kit.errors import CheckFailed
from kit.recipes import RECIPES, Recipe
from quantize import prompt_set
from quantize.gate import contract as contracts
from quantize.gate.drawing import Canvas, Drawing, Pair, open_generator
from quantize.gate.judging import judge_measure
from quantize.gate.measures import likeness
from quantize.gate.metrics import LATENT
from quantize.gate.report import Report

GATED = ("fp8", "int8", "int8-weights", "int4-weights")
GENERAL = (*GATED, "fp8-channel", "int8-plain")  # whose general contracts are judged on null runs
CALIBRATIONS = ("sample:64:7", "sample:64:8", "sample:64:9")
LORA = "outline"  # changes every image, whatever the prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--work", type=Path, default=Path("build/gate-power"), metavar="DIR", help="work folder")
    parser.add_argument("--prompts", type=int, default=96, metavar="N", help="prompts of the sample's grammar")
    parser.add_argument(
        "--null-prompts", type=int, default=400, metavar="N", help="prompts of the null gates by general contracts"
    )


@dataclass(frozen=True)
class Case:
    """One candidate: the images it drew, and those of its reference."""

    recipe: str
    what: str
    null: bool
    pairs: Sequence[Pair]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draw and judge everything; raises CheckFailed if a fault is missed or false alarms are too many."""
    bench = Bench(args.work, prompt_set.load(f"sample:{args.prompts}").prompts)
    rows, alarms, missed = [], {}, []
    for name in GATED:
        cases, contract = bench.cases(RECIPES[name]), contracts.of_recipe(name, sample=True)
        for case in cases:
            report = judge(case.pairs, contract)
            rows.append(_row(case, report))
            if not case.null and report.kept:
                missed.append(f"{name}: {case.what}")
        alarms[name] = sum(map(bool, broken_gates([case.pairs for case in cases if case.null], contract))) / GATES
    many = Bench(args.work, prompt_set.load(f"sample:{args.null_prompts}").prompts)
    facts = {
        "machine": machine.describe(),
        "prompts": args.prompts,
        "calibrations": list(CALIBRATIONS),
        "rows": rows,
        "false_alarms": alarms,
        "general": {name: by_prompts(many.own_pairs(RECIPES[name]), name) for name in GENERAL},
    }
    loud = [f"{name}: {share:.0%}" for name, share in alarms.items() if share > MOST_ALARMS]
    if missed or loud:
        raise CheckFailed(
            f"faults missed: {'; '.join(missed) or 'none'}; false alarms: {'; '.join(loud) or 'few'}", facts
        )
    return facts


COLUMNS = (("latent_snr", 2), ("psnr", 2), ("psnr_tail", 2), ("ssim", 5), ("flip", 4), ("colour", 3))


def table(facts: Mapping[str, Any]) -> str:
    """Render the rows as text."""
    head = "".join(f"{name.replace('_', ' '):>11}" for name, _ in COLUMNS)
    lines = [f"{'recipe':<13} {'run':<26}{head}  broken bounds"]
    for row in facts["rows"]:
        figures = "".join(f"{row[name]:>11.{digits}f}" for name, digits in COLUMNS)
        lines.append(f"{row['recipe']:<13} {row['what']:<26}{figures}  {', '.join(row['broken']) or 'kept'}")
    lines += [f"{name}: {share:.0%} of {GATES} null gates broken" for name, share in facts["false_alarms"].items()]
    general = facts.get("general", {})  # results of before 2026-11-28 have none
    if general:
        lines.append("general contracts, null gates broken by number of prompts:")
    for name, found in general.items():
        shares = ", ".join(f"{share:.0%} with {count}" for count, share in found["false_alarms"].items())
        enough = least_prompts(found["false_alarms"])
        why = f" ({', '.join(found['broken'])})" if found["broken"] else ""
        lines.append(f"{name}: {shares}{why}; least prompts: {enough or 'more than measured'}")
    return "\n".join(lines)


def _row(case: Case, report: Report) -> dict[str, Any]:
    rows = report.rows
    return {
        "recipe": case.recipe,
        "what": case.what,
        "null": case.null,
        **{name: round(rows[name].found.mean, 5) for name in ("psnr", "ssim", "flip", "colour", *LATENT)},
        **{f"{name}_tail": round(rows[name].tail, 5) for name in ("psnr", "ssim", "flip", "colour")},
        "judge_change": round(rows["judge_change"].found.mean, 5),
        "broken": sorted({fault.split()[0] for fault in report.faults}),
    }


class Bench:
    """Makes artifacts in the work folder, and draws with them once."""

    def __init__(self, work: Path, prompts: Sequence[prompt_set.Prompt]) -> None:
        self.work, self.prompts = work, prompts
        work.mkdir(parents=True, exist_ok=True)
        measured = judge_measure(prompts, 128, 128)
        assert not isinstance(measured, str), measured
        self.measures = (likeness, measured)

    def cases(self, recipe: Recipe) -> list[Case]:
        """Return the null runs and the faults of a recipe."""
        reference = self.drawings("fp32", self.exported())
        name, found = recipe.name, []
        own = self.quantized(recipe, name, CALIBRATIONS[0])

        def case(what: str, null: bool, drawn: Sequence[Drawing], truth: Sequence[Drawing] = reference) -> None:
            found.append(Case(name, what, null, self.pairs(truth, drawn)))

        drawn = self.drawings(name, own)
        case("one thread", True, drawn)
        case("two threads", True, self.drawings(f"{name}-threads", own, threads=2))
        if recipe.needs_calibration:
            for number, prompts in enumerate(CALIBRATIONS[1:], start=1):
                other = f"{name}-calibration-{number}"
                case(f"calibrated on {prompts}", True, self.drawings(other, self.quantized(recipe, other, prompts)))
        if name != "int4-weights":
            coarse = self.quantized(one_layer_at_4_bits(recipe), f"{name}-4bit", CALIBRATIONS[0])
            case("one layer at 4 bits", False, self.drawings(f"{name}-4bit", coarse))
        for number, (what, plant) in enumerate(WEIGHT_FAULTS.items()):
            broken = self.work / f"{name}-fault-{number}"
            if not broken.is_dir():
                shutil.copytree(own, broken)
                plant(broken)
            case(what, False, self.drawings(broken.name, broken))
        for what, change in IMAGE_FAULTS.items():
            case(what, False, [Drawing(change(one.pixels), one.latents) for one in drawn])
        case("a LoRA left out", False, drawn, self.drawings("fp32-lora", self.exported(LORA)))
        return found

    def own_pairs(self, recipe: Recipe) -> list[Pair]:
        """Return the pairs of a recipe's own artifact against the fp32 artifact."""
        own = self.quantized(recipe, recipe.name, CALIBRATIONS[0])
        return self.pairs(self.drawings("fp32", self.exported()), self.drawings(recipe.name, own))

    def pairs(self, reference: Sequence[Drawing], drawn: Sequence[Drawing]) -> list[Pair]:
        """Measure every pair of images."""
        made = []
        for number, (prompt, ours, theirs) in enumerate(zip(self.prompts, drawn, reference, strict=True)):
            scores = {key: value for measure in self.measures for key, value in measure(prompt, theirs, ours).items()}
            made.append(Pair(number, prompt, number, scores, ()))
        return made

    def drawings(self, name: str, artifact: Path, threads: int = 1) -> list[Drawing]:
        """Draw every prompt with an artifact, or read what was drawn before."""
        kept = self.work / f"{name}-{len(self.prompts)}.npz"
        if not kept.is_file():
            generate = open_generator(artifact, Canvas(), threads)
            drawn = [generate(prompt.text, seed) for seed, prompt in enumerate(self.prompts)]
            pixels, latents = np.stack([d.pixels for d in drawn]), np.stack([d.latents for d in drawn])
            np.savez(kept, pixels=pixels, latents=latents.astype(np.float16))
        with np.load(kept, allow_pickle=False) as found:
            return [Drawing(*both) for both in zip(found["pixels"], found["latents"], strict=True)]

    def exported(self, lora: str | None = None) -> Path:
        """Export the sample in fp32, with an adapter of its own."""
        from export.artifact import ExportConfig, export
        from export.lora.terms import Lora
        from kit.checkpoint import SHIPPED, resolve

        loras = (Lora(SHIPPED.parent / "loras" / f"{lora}.safetensors"),) if lora else ()
        out = self.work / f"fp32-{lora or 'plain'}"
        export(resolve("sample"), out, ExportConfig(loras=loras))
        return out

    def quantized(self, recipe: Recipe, name: str, prompts: str) -> Path:
        """Calibrate and quantize the sample."""
        from kit.checkpoint import resolve
        from quantize.apply.apply import apply
        from quantize.calibration import record
        from quantize.calibration.calibrate import Calibration, calibrate

        seen = None
        if recipe.needs_calibration:
            file = self.work / f"{prompts.replace(':', '-')}.json"
            if not file.is_file():
                config = Calibration(prompt_set.load(prompts), dtype="fp32", batch=8)
                record.write(calibrate(resolve("sample"), config), file)
            seen = record.read(file)
        apply(self.exported(), self.work / name, recipe, seen)
        return self.work / name
