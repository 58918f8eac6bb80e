"""`quantize search`: choose which layers of a recipe stay in high precision to meet a quality at the lowest cost."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kit.artifact import tool_versions, verify
from kit.atomic_folder import building
from kit.errors import CheckFailed, UsageError
from kit.outputs import SEARCH, checkpoint_files, file_of
from kit.ports import QUANTIZED_PARTS
from kit.recipes import KEEP, RECIPES

SPARES = (KEEP, "int8-weights")
RESULT = "search.json"
PACKAGES = ("torch", "onnxruntime", "numpy", "scikit-image", "flip-evaluator", "matplotlib")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "artifact", type=Path, metavar="DIR", help="artifact written by `export onnx --dtype fp32`, with all parts"
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="CHECKPOINT",
        help="the checkpoint it was exported from, as in `export onnx`",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME", help="recipe of the layers that are not spared")
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="record of `quantize calibrate`; default: none"
    )
    parser.add_argument("--prompts", default="kit:32", metavar="SET", help="kit, kit:N, sample:N, or a file")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for recipes, table, JSON and plot"
    )
    parser.add_argument(
        "--meet",
        action="append",
        default=[],
        metavar="METRIC=VALUE",
        help="quality that the images must meet, for example psnr=45 or ssim=0.99; can be repeated; default: none",
    )
    parser.add_argument(
        "--points", type=int, default=6, metavar="N", help="recipes of the Pareto front to generate images with"
    )
    parser.add_argument("--spare", choices=SPARES, default=KEEP, help="scheme of spared layers; keep: not quantized")
    parser.add_argument(
        "--cost", choices=("operations", "bytes"), help="cost of sparing a layer; default: depends on the recipe"
    )
    parser.add_argument(
        "--samples", type=int, default=32, metavar="N", help="prompts for measuring the effects of layers"
    )
    parser.add_argument(
        "--alone",
        type=int,
        default=0,
        metavar="N",
        help="number of groups to quantize one at a time, to check the predicted order",
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="images per prompt")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps; default: the variant's")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="width of the images; default: the checkpoint's")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="height of the images; default: the checkpoint's")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="guidance scale; default: the variant's")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="prompts per pass when effects are measured")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="compute type of torch; default: the type of the stored weights"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="device of torch: cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="threads of ONNX Runtime; 0: one per core")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[=WEIGHT]", help="as in `export onnx`; default: none"
    )
    parser.add_argument("--config", metavar="CHECKPOINT", help="as in `export onnx`; default: none")
    parser.add_argument("--transformer", metavar="FILE", help="as in `export onnx`; default: none")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the search; raises CheckFailed, once the results are written, if no recipe meets the bounds."""
    for name, least in (("points", 2), ("samples", 1), ("alone", 0), ("seeds", 1), ("batch", 1), ("threads", 0)):
        if getattr(args, name) < least:
            raise UsageError(f"--{name} {getattr(args, name)} is less than {least}")
    if args.recipe not in RECIPES:
        raise UsageError(f"unknown recipe {args.recipe!r}; a search starts from one of: {', '.join(RECIPES)}")
    from quantize.search import plot

    plot.check()
    from quantize.search.bounds import parse

    bounds = [parse(text) for text in args.meet]
    inputs = [args.artifact, args.calibration, file_of(args.prompts), *checkpoint_files(args)]
    with building(args.out, SEARCH, inputs) as folder:
        found = _search(args, bounds, folder)
    print(_markdown(found), end="")
    where = f"see {args.out / 'search.md'}"
    if bounds and found["chosen"] is None:
        raise CheckFailed(f"no recipe found by this search meets {', '.join(map(str, bounds))}; {where}")
    return {name: value for name, value in found.items() if name not in ("groups", "ladder")} | {"out": str(args.out)}


def _search(args: argparse.Namespace, bounds: list[Any], folder: Path) -> dict[str, Any]:
    """Check all arguments, search, and write the results to `folder`."""
    from quantize import prompt_set
    from quantize.calibration import record
    from quantize.gate.admission import admit

    recipe = RECIPES[args.recipe]
    manifest = verify(args.artifact, ("onnx",))
    admit(args.artifact, args.artifact)
    prompts = prompt_set.load(args.prompts)
    seen = record.read(args.calibration) if args.calibration else None
    from quantize.search.groups import ImageShape
    from quantize.search.subject import choose_cost, open_subject  # imports torch

    cost = choose_cost(recipe, args.spare, args.cost)
    model = _model(args, manifest)
    from pipeline.request import Limits, check

    wanted = {name: getattr(args, name) for name in ("width", "height", "steps", "guidance")}
    requests = [
        check({"prompt": prompt.text, "seed": seed, **wanted}, manifest.variant, Limits())
        for seed, prompt in enumerate(prompts.prompts)
    ]
    for prompt in prompts.prompts:
        model.prompts.encode(prompt.text, f"prompt {prompt.id}")
    drawn = requests[0]
    tokens = manifest.variant.tokens(drawn.width, drawn.height)
    image = ImageShape(tokens, drawn.steps, 2 if manifest.variant.guidance == "cfg" else 1)
    from quantize.gate.drawing import Canvas
    from quantize.gate.measures import Scope
    from quantize.search.points import Studio, measures_for

    measures = measures_for(Scope(prompts.prompts, drawn.width, drawn.height), bounds)
    subject = open_subject(args.artifact, manifest, model, recipe, seen, args.spare, image)
    from tqdm import tqdm

    from quantize.search import plot, report
    from quantize.search.find import Search
    from quantize.search.ladder import Problem
    from quantize.search.sensitivity import measure

    with tqdm(unit="run", disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.set_description(what)
            bar.total, bar.n = total, done
            bar.refresh()

        chosen = requests[: args.samples]
        effects = measure(model, subject.groups, subject.shelves, chosen, args.batch, progress=progress)
    print(f"effects of {len(subject.groups)} groups measured on {len(chosen)} prompts", flush=True)
    finals = {key: effect.final for key, effect in effects.items()}
    problem = Problem(subject.groups, finals, cost, args.spare == KEEP)
    scratch = folder / "recipes"
    scratch.mkdir()
    with tqdm(unit="image", disable=not sys.stderr.isatty(), leave=False) as bar:

        def tick(name: str) -> None:
            bar.set_description(name)
            bar.update()

        def report_line(line: str) -> None:
            bar.write(line, file=sys.stdout)
            sys.stdout.flush()

        canvas = Canvas(drawn.width, drawn.height, drawn.steps, drawn.guidance)
        studio = Studio(
            reference=args.artifact,
            base=recipe.name,
            record=seen,
            prompts=prompts.prompts,
            seeds=args.seeds,
            canvas=canvas,
            measures=measures,
            scratch=scratch,
            threads=args.threads,
            tick=tick,
            report=report_line,
        )
        search = Search(problem, effects, recipe.name, args.spare, studio.draw, args.points, bounds, args.alone)
        bar.reset(2 * search.most_drawings() * len(prompts.prompts) * args.seeds)
        found = search.run()
    if found.chosen is not None:
        shutil.copyfile(scratch / f"{found.chosen.name}.json", folder / "recipe.json")
    (scratch / f"{recipe.name}-alone.json").unlink(missing_ok=True)
    facts = {
        "variant": manifest.variant.name,
        "recipe": recipe.name,
        "spare": args.spare,
        "bounds": [asdict(bound) | {"side": bound.side} for bound in bounds],
        "prompts": {"spec": Path(prompts.spec).name, "digest": prompts.digest, "count": len(prompts.prompts)},
        "seeds": args.seeds,
        "samples": len(chosen),
        "canvas": asdict(canvas),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": tool_versions(*PACKAGES),
        **report.facts(found),
    }
    plot.draw(facts, folder / "search.png")
    (folder / "search.md").write_text(report.to_markdown(facts), encoding="utf-8")
    (folder / RESULT).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return facts


def _model(args: argparse.Namespace, manifest: Any) -> Any:
    """Locate the checkpoint's weights without loading them."""
    from export.lora.terms import Lora
    from export.sources import find_sources
    from export.torch_part import bind, check_device
    from pipeline.prompts import PromptEncoder
    from quantize.search.sensitivity import Model

    check_device(args.device, "none")
    loras = tuple(Lora.parse(text) for text in args.lora)
    sources = find_sources(args.checkpoint, QUANTIZED_PARTS, args.config, args.transformer)
    variant = manifest.variant
    bindings = {
        part: bind(part, variant, sources.checkpoint, sources.single_files.get(part), loras) for part in QUANTIZED_PARTS
    }
    prompts = PromptEncoder(args.artifact / "tokenizer", variant.text_encoder.kind, variant.text_tokens)
    return Model(variant, bindings, prompts, args.dtype, args.device)


def _markdown(facts: dict[str, Any]) -> str:
    from quantize.search.report import to_markdown

    return to_markdown(facts)
