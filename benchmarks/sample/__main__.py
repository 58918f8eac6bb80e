"""Train, measure and judge the sample checkpoint: ``python -m benchmarks.sample train | loras | evaluate | judge``."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from kit.cli import report
from kit.commands import Help, Parser
from kit.errors import CheckFailed, UsageError

from .recipe import Stages, TrainingRecipe

HOME = Path("kit/sample")  # where the sample that ships with the kit is


def parser() -> argparse.ArgumentParser:
    """Build the command line; defaults come from the recipe."""
    top = Parser(prog="python -m benchmarks.sample", description=__doc__, formatter_class=Help)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    recipe = TrainingRecipe()

    def command(name: str, says: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=says, description=f"{says[0].upper()}{says[1:]}.", formatter_class=Help)
        made.add_argument("--json", action="store_true", help="print one JSON object on the last line")
        return made

    for name, says in (
        ("train", "train the checkpoint and its LoRAs from scratch; resumes an interrupted run"),
        ("loras", "train only the LoRAs, on an existing checkpoint"),
    ):
        made = command(name, says)
        made.add_argument(
            "--work",
            type=Path,
            default=Path("build/sample-training"),
            metavar="DIR",
            help="folder for training checkpoints",
        )
        made.add_argument(
            "--out",
            type=Path,
            default=Path("build/sample-trained"),
            metavar="DIR",
            help=f"output folder of checkpoint/, loras/ and digests.json; {HOME} replaces the shipped sample",
        )
        made.add_argument("--curve", type=Path, metavar="FILE", help="plot of the losses; default: none")
        made.add_argument("--record", type=Path, metavar="FILE", help="record of the stages' times; default: none")
        made.add_argument("--seed", type=int, default=recipe.seed, metavar="N", help="seed of the training")
        if name == "train":
            made.add_argument(
                "--from",
                dest="start",
                type=Path,
                metavar="CHECKPOINT",
                help="continue from finished weights with the stages that --stages names; default: from scratch",
            )
            made.add_argument(
                "--stages",
                choices=get_args(Stages),
                default="last",
                help="with --from: edit is denoiser_edit and denoiser_edit_long, which teach the transformer to edit; "
                "last is vae_sharp, vae_faint, denoiser_last and denoiser_hard, followed by these",
            )
    made = command("evaluate", "generate, edit and judge images of held-out prompts; exit 1 if a target is missed")
    made.add_argument("--sample", type=Path, default=HOME, metavar="DIR", help="folder with checkpoint/ and loras/")
    made.add_argument("--out", type=Path, metavar="FILE", help="also write the results there, JSON; default: none")
    made.add_argument("--prompts", type=int, default=300, metavar="N", help="number of held-out prompts")
    made.add_argument("--edits", type=int, default=200, metavar="N", help="number of held-out edits")
    made = command("judge", "print what the judge sees in an image; with --prompt or --edit, exit 1 if it differs")
    made.add_argument("image", type=Path, metavar="FILE", help="the image to read")
    wanted = made.add_mutually_exclusive_group()
    wanted.add_argument("--prompt", metavar="TEXT", help="a sentence of the sample's grammar; default: none")
    wanted.add_argument("--edit", metavar="TEXT", help="an instruction of the sample's grammar; default: none")
    made.add_argument("--before", type=Path, metavar="FILE", help="with --edit: the reference image; default: none")
    return top


class Progress:
    """A progress bar on a terminal, or an occasional plain line when piped."""

    def __init__(self) -> None:
        self.started, self.said, self.stage, self.first = time.monotonic(), 0.0, "", 0

    def __call__(self, stage: str, step: int, steps: int, loss: float) -> None:
        now, terminal = time.monotonic(), sys.stderr.isatty()
        if stage != self.stage:
            self.stage, self.started, self.first = stage, now, step - 1
        if step < steps and now - self.said < (0.5 if terminal else 15):
            return
        self.said = now
        left = (now - self.started) / max(1, step - self.first) * (steps - step)
        said = f"{stage:>13} {step:>5}/{steps} loss {loss:.4f} {left:4.0f} s left"
        if terminal:
            bar = "#" * (20 * step // steps)
            print(f"\r{said} [{bar:<20}]", end="\n" if step == steps else "", file=sys.stderr, flush=True)
        else:
            print(said, file=sys.stderr, flush=True)


def circumstances(argv: Sequence[str]) -> dict[str, Any]:
    """Return the circumstances of a measurement: the command, the machine, the versions, the date."""
    import os
    from importlib.metadata import version

    import torch

    names = ("torch", "diffusers", "transformers", "peft", "numpy")
    return {
        "command": " ".join(["python -m benchmarks.sample", *argv]),
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "")
    return f"{names[0] if names else platform.machine()}{' with avx512_bf16' if 'avx512_bf16' in flags else ''}"


def train(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Run ``train`` or ``loras``."""
    from . import training
    from .continuing import go_on
    from .curve import write_curve
    from .trainer import Run

    recipe, progress = replace(TrainingRecipe(), seed=options.seed), Progress()
    checkpoint, start = options.out / "checkpoint", getattr(options, "start", None)
    runs, facts = list[Run](), dict[str, Any]()
    if start:
        runs += go_on(recipe, options.work, start, checkpoint, progress, options.stages)
        facts["from"] = training.digests(options.work / "start")
    elif options.command == "train":
        runs += training.train_checkpoint(recipe, options.work, checkpoint, progress)
    runs += training.train_loras(recipe, options.work, checkpoint, options.out / "loras", progress)
    (options.out / "digests.json").write_text(json.dumps(training.digests(options.out), indent=1) + "\n")
    facts |= {"bytes": training.check_sizes(options.out), "stages": training.times(runs)} | circumstances(argv)
    if options.command == "train":
        if options.curve is not None:
            write_curve(training.curves(runs), options.curve)
        if options.record is not None:
            options.record.parent.mkdir(parents=True, exist_ok=True)
            options.record.write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def evaluate(options: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Run ``evaluate``."""
    from .denoiser_training import training_scenes
    from .evaluate import evaluate as measure

    recipe = TrainingRecipe()
    trained = training_scenes(recipe.scenes, recipe.seed + 20)
    started = time.monotonic()
    found = measure(options.sample / "checkpoint", options.sample / "loras", trained, options.prompts, options.edits)
    found |= {"seconds": round(time.monotonic() - started, 1)} | circumstances(argv)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def judge(options: argparse.Namespace) -> dict[str, Any]:
    """Run ``judge``."""
    from dataclasses import asdict

    import numpy as np
    from PIL import Image

    from kit.sample.edit_score import picture_from, score_edit
    from kit.sample.edits import parse_edit
    from kit.sample.judge import Reading, read
    from kit.sample.score import perfect, score
    from kit.sample.world import parse

    def seen(path: Path) -> Reading:
        return read(np.asarray(Image.open(path).convert("RGB")))

    if (options.edit is None) != (options.before is None):
        raise ValueError("--edit and --before belong together: the instruction and the image that it changes")
    reading = seen(options.image)
    found = asdict(reading)
    if options.prompt:
        found["passed"] = perfect(score(parse(options.prompt), reading))
    if options.edit:
        judged = score_edit(parse_edit(options.edit), picture_from(seen(options.before)), reading)
        found |= asdict(judged) | {"passed": judged.made and judged.stayed == judged.should_stay}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 on success, 1 if a target is missed, 2 for wrong use or bad input."""
    argv = sys.argv[1:] if argv is None else argv

    def step() -> dict[str, Any]:
        options = parser().parse_args(argv)
        try:
            if options.command == "judge":
                found = judge(options)
            elif options.command == "evaluate":
                found = evaluate(options, argv)
            else:
                found = train(options, argv)
        except (OSError, ValueError) as problem:
            raise UsageError(f"{options.command}: {problem}") from problem
        if not options.json:
            print(json.dumps(found, indent=1))
        if not found.get("passed", True):
            raise CheckFailed(f"{options.command}: a target was missed", found)
        return found

    return report(step, "--json" in argv)


if __name__ == "__main__":
    raise SystemExit(main())
