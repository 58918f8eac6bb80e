"""Command `kit plan`: turn the options into a question and print the plan as text, JSON or a chart."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from kit.errors import CheckFailed, UsageError
from kit.gpus import GPUS, gpu
from kit.outputs import check_out_file
from kit.recipes import RECIPES, recipe
from kit.variants import VARIANTS
from planner.built import Built, read_built
from planner.layout import Placement
from planner.names import find_variant
from planner.plan import Plan, plan
from planner.prices import Prices, read_prices
from planner.question import Question
from planner.text import number

ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `kit plan`; their defaults come from Question."""
    parser.add_argument(
        "--variant",
        metavar="NAME",
        help=f"{', '.join(VARIANTS)}, sample, a hub id, a folder with a checkpoint or artifact, or {ALL} for a table; "
        "default: that of --engine",
    )
    parser.add_argument(
        "--gpu", metavar="NAME", help=f"{', '.join(GPUS)}, or {ALL} to compare them; default: that of --engine"
    )
    parser.add_argument(
        "--engine",
        type=Path,
        metavar="DIR",
        help="an engine artifact, whose variant, GPU, recipe, plan sizes, activation memory and roofline replace those "
        "of the formulas; default: none",
    )
    parser.add_argument(
        "--recipe", metavar="NAME", help=f"{', '.join(RECIPES)}; default: the GPU's recipe, then smaller ones"
    )
    parser.add_argument(
        "--text-encoder",
        choices=get_args(Placement),
        help="where the text encoder runs; cache is not built yet; default: the first placement that works",
    )
    for side in ("width", "height"):
        parser.add_argument(
            f"--{side}", type=int, metavar="PIXELS", help=f"{side} of an image; default: the checkpoint's own"
        )
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps; default: those of the variant")
    parser.add_argument("--batch", type=int, default=Question.batch, metavar="N", help="images per batch")
    parser.add_argument(
        "--references",
        type=int,
        default=Question.references,
        metavar="N",
        help="reference images of each image, each of one megapixel or of the checkpoint's own size if that is smaller",
    )
    parser.add_argument(
        "--rate", type=float, metavar="N", help="requested images per minute; default: none, costs at full load"
    )
    parser.add_argument(
        "--p95",
        type=float,
        metavar="SECONDS",
        help="goal for the time of 95 %% of the requests at --rate, which sets the replicas; default: no goal",
    )
    parser.add_argument(
        "--replicas", type=int, metavar="N", help="number of replicas; default: as many as --rate and --p95 need"
    )
    parser.add_argument("--gpus", type=int, default=Question.gpus, metavar="N", help="GPUs per replica")
    parser.add_argument("--cores", type=int, default=Question.cores, metavar="N", help="CPU cores of the host")
    parser.add_argument(
        "--step-seconds",
        type=float,
        metavar="S",
        help="measured duration of one step of the batch; default: an estimate",
    )
    prices = parser.add_mutually_exclusive_group()
    prices.add_argument(
        "--price", type=float, metavar="USD", help="dollars per GPU hour; default: the cheapest offer that fits"
    )
    prices.add_argument("--prices", type=Path, metavar="FILE", help="JSON file with prices; default: the kit's")
    parser.add_argument(
        "--chart", type=Path, metavar="FILE", help="also draw the plan into this .png or .svg file; default: no chart"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Plan and print the result; raises CheckFailed if no plan works, or none meets the goal."""
    if args.price is not None and not 0 < args.price < 1e6:
        raise UsageError(f"--price {args.price:g}: must be more than 0 dollars per GPU hour")
    built = None if args.engine is None else _engine(args)
    if args.variant is None or args.gpu is None:
        raise UsageError(f"--{'gpu' if args.variant else 'variant'} is required without --engine")
    every_gpu, every_variant = (word.strip().lower() == ALL for word in (args.gpu, args.variant))
    if (every_gpu or every_variant) and args.step_seconds is not None:
        raise UsageError(
            f"--step-seconds applies to one GPU and cannot be combined with --{'gpu' if every_gpu else 'variant'} {ALL}"
        )
    if args.chart is not None:
        check_out_file(args.chart, [args.prices], "--chart")
    prices = read_prices(args.prices)
    cards = list(GPUS.values()) if every_gpu else [gpu(args.gpu)]
    if every_variant:
        return _decide(args, [_question(args, name, card.name) for name in VARIANTS for card in cards], prices)
    questions = [replace(_question(args, args.variant, card.name), built=built) for card in cards]
    if refused := questions[0].refusal():
        raise UsageError(refused)
    answers = [plan(question, prices, args.price) for question in questions]
    if args.chart is not None:
        from planner.chart import draw

        draw(answers, args.chart)
    from planner.compare import compare, ranked

    if every_gpu and args.rate is not None:
        answers = ranked(answers)
    if not args.json:
        from planner.text import coloured, render

        print(compare(answers, coloured()) if every_gpu else render(answers[0], coloured()))
        if args.chart is not None:
            print(f"\ndrawn: {args.chart}")
    _check(answers)
    from planner.facts import facts

    return {"gpus": [facts(answer) for answer in answers]} if every_gpu else facts(answers[0])


def _engine(args: argparse.Namespace) -> Built:
    """Read the engine and let its variant, GPU and recipe be those of the question."""
    built = read_built(args.engine)
    for name, own in (("variant", built.variant.name), ("gpu", built.gpu), ("recipe", built.recipe)):
        given = getattr(args, name)
        if given is not None and given.strip().lower() != own:
            raise UsageError(f"--{name} {given}: {args.engine} was built for {own}; leave --{name} out")
        setattr(args, name, own)
    args.variant = str(args.engine)  # whose sizes and image are its own
    return built


def _decide(args: argparse.Namespace, questions: Sequence[Question], prices: Prices) -> dict[str, Any]:
    """Print the decision table of all variants."""
    if args.chart is not None:
        raise UsageError(f"--chart draws one variant and cannot be combined with --variant {ALL}")
    for question in questions:
        if refused := replace(question, recipe=None).refusal():
            raise UsageError(refused)
    from planner.decision import decide, table

    rows = [decide(plan(question, prices, args.price)) for question in questions]
    if not args.json:
        from planner.text import coloured

        print(table(rows, coloured()))
    return {"rows": [row.facts() for row in rows]}


def _question(args: argparse.Namespace, variant: str, card: str) -> Question:
    found = find_variant(variant)
    return Question(
        variant=found,
        gpu=gpu(card),
        recipe=recipe(args.recipe.strip().lower()).name if args.recipe else None,
        text_encoder=args.text_encoder,
        width=found.image_size if args.width is None else args.width,
        height=found.image_size if args.height is None else args.height,
        steps=args.steps,
        batch=args.batch,
        references=args.references,
        gpus=args.gpus,
        cores=args.cores,
        rate=args.rate,
        p95=args.p95,
        replicas=args.replicas,
        step_seconds=args.step_seconds,
    )


def _check(answers: list[Plan]) -> None:
    """Raise if no plan works, with the reason and the GPUs on which one would, or if none meets the goal."""
    working = [answer for answer in answers if answer.chosen]
    if working:
        _check_goal(working)
        return
    first = answers[0]
    question = first.question
    where = f"; it works on {', '.join(first.elsewhere)}" if first.elsewhere else ""
    near = f"; nearest here: {first.nearest}" if first.nearest else ""
    reasons = {tried.layout.reason for tried in first.tried}
    why = f": {reasons.pop()}" if len(reasons) == 1 else ""
    raise CheckFailed(f"no plan for {question.variant.name} works on {question.gpu.name}{why}{near}{where}")


def _check_goal(answers: Sequence[Plan]) -> None:
    """Raise if no plan meets the goal for the 95th percentile; the message is about the fastest."""
    loads = [answer.load for answer in answers if answer.load is not None]
    if not loads or any(load.meets for load in loads):
        return
    fastest = min(answers, key=lambda answer: _slow_end(answer))
    question, load = fastest.question, fastest.load
    assert load is not None
    where = f"{load.replicas:,} {'replica' if load.replicas == 1 else 'replicas'} of {question.gpu.name}"
    if load.slow is None:
        raise CheckFailed(f"{where} cannot keep up with --rate {question.rate:g} at the slow end of the estimate")
    best = "" if question.replicas else f"; one image alone takes up to {number(_slow_end(fastest))} s"
    raise CheckFailed(f"--p95 {load.goal:g} is not met: {number(load.slow.p95)} s with {where}{best}")


def _slow_end(answer: Plan) -> float:
    assert answer.chosen is not None
    assert answer.chosen.timing is not None
    return answer.chosen.timing.image.high
