"""The command `export engine`: its options and its output."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from kit.compilers import AUTO, COMPILERS, Hardware, Version, WeightMode
from kit.errors import UsageError
from kit.gpus import GPUS, gpu
from kit.ports import ALL_PARTS, PartName
from runtimes.trt.profiles import Sizing
from runtimes.trt.record import PlanRecord

GB = 10**9


def add_arguments(engine: argparse.ArgumentParser) -> None:
    """Add the options."""
    from runtimes.trt.build.options import EngineOptions, Engines, default_timing_cache

    engine.description = (
        "Build TensorRT engines. A build that cannot succeed is rejected before it starts, with the nearest setting "
        "that would work. --check stops after these checks, with an estimate of time, memory and disk, and needs "
        "neither TensorRT nor a GPU."
    )
    engine.add_argument("artifact", type=Path, metavar="DIR", help="an artifact of `export onnx` or `quantize apply`")
    engine.add_argument("--gpu", required=True, metavar="NAME", help=f"one of {', '.join(GPUS)}")
    engine.add_argument("--out", type=Path, required=True, metavar="DIR", help="the engine artifact to write")
    engine.add_argument(
        "--check",
        action="store_true",
        help="print what would be built and what that takes, or why it cannot be built, and stop",
    )
    engine.add_argument("--parts", metavar="A,B", help="parts to build; default: all parts of the artifact")
    sizes = engine.add_argument_group("image sizes")
    sizes.add_argument(
        "--sides",
        default=",".join(map(str, Sizing.sides)),
        metavar="PIXELS,...",
        help="sides of squares; each gives a profile for all images with as many tokens",
    )
    sizes.add_argument(
        "--max-batch", type=int, default=Sizing.max_batch, metavar="N", help="largest batch of images at one megapixel"
    )
    sizes.add_argument(
        "--references",
        type=int,
        default=Sizing.references,
        metavar="N",
        help="largest number of reference images, of one megapixel each",
    )
    sizes.add_argument(
        "--profile",
        action="append",
        default=[],
        metavar="PART:AXIS=LOW..BEST..HIGH,...",
        help="replaces the derived profiles of a part, such as transformer:batch=1..2,image_tokens=256..4096..4096; "
        "can be repeated; default: none",
    )
    how = engine.add_argument_group("build")
    default = EngineOptions
    how.add_argument(
        "--compiler",
        choices=(AUTO, *COMPILERS),
        default=default.compiler,
        help="auto: TensorRT on a machine with that GPU, TensorRT for RTX on any other",
    )
    for name, choices, about in (
        ("engines", get_args(Engines), "all profiles in one plan per part, or a plan for each"),
        (
            "weights",
            get_args(WeightMode),
            "in the plan; in a file that the plans share; streamed from host memory; or inputs of the plan, which then "
            "serves every checkpoint of its sizes",
        ),
        ("hardware", get_args(Hardware), "other GPUs that the plans must run on, at the cost of speed"),
        ("version", get_args(Version), "whether newer versions of TensorRT must load the plans, at the cost of speed"),
    ):
        how.add_argument(f"--{name}", choices=choices, default=getattr(default, name), help=f"{about}")
    how.add_argument("--level", type=int, default=default.level, metavar="0..5", help="optimization level")
    how.add_argument(
        "--workspace", type=float, metavar="GB", help="scratch memory of the build; default: all free memory"
    )
    how.add_argument(
        "--timing-cache",
        type=Path,
        default=default_timing_cache(),
        metavar="DIR",
        help="folder of kernel timings that later builds reuse",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check, build and print; returns the facts for --json."""
    from runtimes.trt.build.artifact import check, check_machine, write_engine
    from runtimes.trt.build.estimate import estimated
    from runtimes.trt.build.options import PlannedPlan

    request = check(args.artifact, _options(args), args.out)
    if args.check:
        for plan in request.plans:
            for profile in plan.profiles:
                print(f"{plan.file:<32} {profile}")
        print(f"the build is feasible for {request.options.gpu} with {request.compiler.title}")
        found = estimated(request.artifact, request.manifest, request.options, request.plans, request.compiler)
        print(found.describe())
        return {
            "plans": _facts(request.plans),
            "gpu": request.options.gpu,
            "compiler": request.compiler.name,
            "estimate": found.facts(),
            "checked": True,
        }
    machine = check_machine(request)
    assert machine.device is not None
    from runtimes.trt.build.jobs import Job, build_all
    from runtimes.trt.build.report import Report

    device, version = machine.device, machine.tensorrt or ""

    def build(targets: Sequence[tuple[PlannedPlan, Path]]) -> Sequence[PlanRecord]:
        jobs = []
        for plan, target in targets:
            record = request.manifest.part(plan.part)
            graph = request.artifact / record.graph
            compiler = request.compiler.name
            jobs.append(Job(plan, graph, record.ports, request.options, target, compiler, device, args.timing_cache))
        with Report(jobs) as report:
            return build_all(jobs, version, report.tick, report.done)

    manifest, seconds = write_engine(request, machine, args.out, build)
    print(
        f"{args.out}: {manifest.variant.name} {manifest.recipe} for {machine.device.title}, "
        + (f"built in {seconds:.0f} s" if seconds else "up to date")
    )
    return {"out": str(args.out), "seconds": round(seconds, 1), **manifest.options}


def _options(args: argparse.Namespace) -> Any:
    from runtimes.trt.build.options import EngineOptions

    sides = tuple(_number(word, "--sides") for word in args.sides.split(",") if word.strip())
    stated: dict[PartName, tuple[str, ...]] = {}
    for text in args.profile:
        part, colon, axes = text.partition(":")
        if not colon:
            raise UsageError(f"--profile {text!r}: does not start with a part; for example transformer:{text}")
        known = _part(part, "--profile")
        stated[known] = (*stated.get(known, ()), axes)
    return EngineOptions(
        gpu=gpu(args.gpu).name,
        parts=tuple(_part(word, "--parts") for word in args.parts.split(",")) if args.parts else (),
        sizing=Sizing(sides, args.max_batch, args.references),
        stated=stated,
        engines=args.engines,
        compiler=args.compiler,
        weights=args.weights,
        hardware=args.hardware,
        version=args.version,
        level=args.level,
        workspace=None if args.workspace is None else int(args.workspace * GB),
    )


def _number(word: str, option: str) -> int:
    if not word.strip().isdigit():
        raise UsageError(f"{option}: {word.strip()!r} is not a number")
    return int(word)


def _part(word: str, option: str) -> PartName:
    for part in ALL_PARTS:
        if part == word.strip():
            return part
    raise UsageError(f"{option}: unknown part {word.strip()!r}; there are: {', '.join(ALL_PARTS)}")


def _facts(plans: Any) -> list[dict[str, Any]]:
    return [
        {
            "part": plan.part,
            "file": plan.file,
            "profiles": {p.name: {a: [r.low, r.best, r.high] for a, r in p.axes.items()} for p in plan.profiles},
        }
        for plan in plans
    ]
