"""Command `kit plan`: turn the options into a question and print the plan as text, JSON or a chart."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from kit.configs import read_variant
from kit.errors import CheckFailed, UsageError
from kit.gpus import GPUS, gpu
from kit.recipes import RECIPES, recipe
from kit.variants import VARIANTS, Variant
from planner.layout import Placement
from planner.plan import Plan, Question, plan
from planner.prices import read_prices

ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `kit plan`; their defaults come from Question."""
    parser.add_argument(
        "--variant", required=True, metavar="NAME", help=f"{', '.join(VARIANTS)}, or a folder: checkpoint or artifact"
    )
    parser.add_argument("--gpu", required=True, metavar="NAME", help=f"{', '.join(GPUS)}, or {ALL} to compare them")
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"{', '.join(RECIPES)}; default: the GPU's recipe, then smaller ones"
    )
    parser.add_argument(
        "--text-encoder",
        choices=get_args(Placement),
        help="default: the first placement that works; cache is not built yet",
    )
    parser.add_argument("--width", type=int, default=Question.width, help="pixels of an image")
    parser.add_argument("--height", type=int, default=Question.height, help="pixels of an image")
    parser.add_argument("--steps", type=int, help="default: the steps of the variant")
    parser.add_argument("--batch", type=int, default=Question.batch, help="images per batch")
    parser.add_argument("--rate", type=float, metavar="N", help="requested images per minute")
    parser.add_argument("--replicas", type=int, metavar="N", help="default: as many as the rate needs")
    parser.add_argument("--gpus", type=int, default=Question.gpus, metavar="N", help="GPUs per replica")
    parser.add_argument("--cores", type=int, default=Question.cores, metavar="N", help="CPU cores of the host")
    parser.add_argument(
        "--step-seconds",
        type=float,
        metavar="S",
        help="measured duration of one step of the batch; replaces the estimate",
    )
    prices = parser.add_mutually_exclusive_group()
    prices.add_argument("--price", type=float, metavar="USD", help="dollars per GPU hour; replaces the price table")
    prices.add_argument("--prices", type=Path, metavar="FILE", help="price table that replaces the kit's")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="also draw the plan as .png or .svg")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan and print the result; raises CheckFailed if no plan works."""
    question = _question(args)
    if refused := question.refusal():
        raise UsageError(refused)
    if args.gpu == ALL and args.step_seconds is not None:
        raise UsageError(f"--step-seconds applies to one GPU and cannot be combined with --gpu {ALL}")
    if args.price is not None and not 0 < args.price < 1e6:
        raise UsageError(f"--price {args.price:g}: must be more than 0 dollars per GPU hour")
    prices = read_prices(args.prices)
    asked = [replace(question, gpu=card) for card in GPUS.values()] if args.gpu == ALL else [question]
    answers = [plan(one, prices, args.price) for one in asked]
    if args.chart is not None:
        from planner.chart import draw

        draw(answers, args.chart)
    if not args.json:
        from planner.text import coloured, compare, render

        print(compare(answers, coloured()) if args.gpu == ALL else render(answers[0], coloured()))
        if args.chart is not None:
            print(f"\ndrawn: {args.chart}")
    _check(answers)
    from planner.facts import facts

    return facts(answers[0]) if args.gpu != ALL else {"gpus": [facts(answer) for answer in answers]}


def _question(args: argparse.Namespace) -> Question:
    return Question(
        variant=_variant(args.variant),
        gpu=next(iter(GPUS.values())) if args.gpu == ALL else gpu(args.gpu),
        recipe=recipe(args.recipe).name if args.recipe else None,
        text_encoder=args.text_encoder,
        width=args.width,
        height=args.height,
        steps=args.steps,
        batch=args.batch,
        gpus=args.gpus,
        cores=args.cores,
        rate=args.rate,
        replicas=args.replicas,
        step_seconds=args.step_seconds,
    )


def _variant(words: str) -> Variant:
    """Return a published variant by name, or the sizes of a checkpoint or artifact folder."""
    folder = Path(words)
    if words in VARIANTS or not folder.is_dir():
        return Variant.named(words)
    from kit.artifact import MANIFEST, read_manifest

    return read_manifest(folder).variant if (folder / MANIFEST).is_file() else read_variant(folder)


def _check(answers: list[Plan]) -> None:
    """Raise if no plan works, with the reason and the GPUs on which one would."""
    if any(answer.chosen for answer in answers):
        return
    first = answers[0]
    question = first.question
    where = f"; it works on {', '.join(first.elsewhere)}" if first.elsewhere else ""
    near = f"; nearest here: {first.nearest}" if first.nearest else ""
    reasons = {tried.layout.reason for tried in first.tried}
    why = f": {reasons.pop()}" if len(reasons) == 1 else ""
    raise CheckFailed(f"no plan for {question.variant.name} works on {question.gpu.name}{why}{near}{where}")
