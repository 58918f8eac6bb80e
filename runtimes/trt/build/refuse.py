"""Check whether a build can succeed before it starts; otherwise it may fail after half an hour."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kit.artifact import Manifest
from kit.compilers import COMPILERS, Compiler, installed
from kit.cuda_device import Machine
from kit.gpus import gpu
from kit.ports import KV_PARTS, PartName
from kit.recipes import RECIPES, Recipe
from planner import feasible
from runtimes.trt.build.options import EngineOptions, PlannedPlan
from runtimes.trt.profiles import REFERENCE_TOKENS, Profile

ATTENTION = (10, 14)  # the first version whose parser supports the Attention operator


def refusal(
    manifest: Manifest,
    chosen: Recipe,
    options: EngineOptions,
    plans: Sequence[PlannedPlan],
    disk_free: int | None,
) -> str | None:
    """Return why artifact and options cannot give an engine, and the nearest setting that can; None if they can.

    Raises UsageError for an unknown GPU.
    """
    return next(_against_options(manifest, chosen, options, plans), None) or next(
        (
            why
            for build in _builds(manifest, chosen, options, plans, disk_free)
            if (why := feasible.refusal(build)) is not None
        ),
        None,
    )


def judged_as(artifact: Path, manifest: Manifest) -> Recipe:
    """Return the shipped recipe by whose formats memory and hardware are judged.

    A recipe file of the user's can mix schemes, so it is judged by the most demanding format in the graphs.
    """
    if manifest.recipe in RECIPES:
        return RECIPES[manifest.recipe]
    import onnx

    stored: set[int] = set()
    activations = False
    for record in manifest.parts.values():
        graph = onnx.ModelProto.FromString((artifact / record.graph).read_bytes()).graph
        stored |= {tensor.data_type for tensor in graph.initializer}
        activations = activations or any(node.op_type == "QuantizeLinear" for node in graph.node)
    if onnx.TensorProto.FLOAT8E4M3FN in stored:
        return RECIPES["fp8"]
    if onnx.TensorProto.INT8 in stored:
        return RECIPES["int8" if activations else "int8-weights"]
    return RECIPES["int4-weights" if onnx.TensorProto.INT4 in stored else manifest.compute]


def _against_options(
    manifest: Manifest, chosen: Recipe, options: EngineOptions, plans: Sequence[PlannedPlan]
) -> Iterator[str]:
    card = gpu(options.gpu)
    if manifest.compute == "fp32" and chosen.compute != "fp32":
        yield (
            f"the artifact is {manifest.recipe} with fp32 activations, which is for a CPU: on a GPU they need twelve "
            "times the memory of bf16; export with --dtype bf16 and quantize again"
        )
    if manifest.compute == "fp32" and manifest.options.get("attention") == "op":
        yield (
            "TensorRT has no kernel for the Attention operator in fp32: export with --attention matmul or --dtype bf16"
        )
    several = next((plan for plan in plans if len(plan.profiles) > 1), None)
    if options.weights == "refit" and several is not None:
        yield (
            f"--weights refit supports one profile per plan, the {several.part} has {len(several.profiles)}: "
            "use --engines per-profile or --weights plan"
        )
    if options.hardware == "ampere-plus" and chosen.math == "fp8":
        yield (
            "--hardware ampere-plus starts at compute capability 8.0, fp8 needs 8.9: "
            "use --hardware same-capability or an int8 artifact"
        )
    if options.hardware != "exact" and card.compute_capability < (8, 0):
        yield f"--hardware {options.hardware} needs Ampere or newer, {card.name} has {card.capability}"


def _builds(
    manifest: Manifest,
    chosen: Recipe,
    options: EngineOptions,
    plans: Sequence[PlannedPlan],
    disk_free: int | None,
) -> Iterator[feasible.Build]:
    """Yield a build for every profile, and one of all parts together for the disk."""
    parts: tuple[PartName, ...] = tuple(dict.fromkeys(plan.part for plan in plans))
    copies = max((sum(plan.part == part for plan in plans) for part in parts), default=1)
    asked = options.sizing.references * REFERENCE_TOKENS
    for plan in plans:
        for profile in plan.profiles:
            low, high = _tokens(profile)
            references = min(asked, high - low) if plan.part == "transformer" else 0
            if "ref_tokens" in profile.axes:
                references = profile.axes["ref_tokens"].high
            batch = profile.axes["batch"].high
            yield feasible.Build(
                variant=manifest.variant,
                recipe=chosen.name,
                gpu=gpu(options.gpu),
                min_tokens=low,
                max_tokens=high - references if plan.part == "transformer" else high,
                reference_tokens=references,
                batch=max(1, batch // (2 if manifest.variant.guidance == "cfg" else 1)),
                parts=("transformer" if plan.part in KV_PARTS else plan.part,),
                weight_streaming=options.weights == "stream",
                stripped=options.weights in ("refit", "inputs"),
            )
    if disk_free is not None:
        yield feasible.Build(
            variant=manifest.variant,
            recipe=chosen.name,
            gpu=gpu(options.gpu),
            max_tokens=feasible.MIN_TOKENS,
            parts=parts,
            weight_streaming=True,  # memory is checked above
            stripped=options.weights in ("refit", "inputs"),
            disk_free=disk_free // copies,
        )


def _tokens(profile: Profile) -> tuple[int, int]:
    """Return the smallest and largest number of image tokens of a profile; arbitrary for the text encoder."""
    if "image_tokens" in profile.axes:
        return profile.axes["image_tokens"].low, profile.axes["image_tokens"].high
    if "latent_height" in profile.axes:
        height, width = profile.axes["latent_height"], profile.axes["latent_width"]
        return height.low * width.low, height.high * width.high
    return feasible.MIN_TOKENS, feasible.MIN_TOKENS


def compiler_refusal(options: EngineOptions, row: Compiler) -> str | None:
    """Return which option the chosen compiler does not support and the nearest setting that works; None if all work."""
    chosen: tuple[tuple[str, str, tuple[str, ...]], ...] = (
        ("weights", options.weights, row.weights),
        ("hardware", options.hardware, row.hardware),
        ("version", options.version, row.versions),
    )
    for name, value, supported in chosen:
        if value not in supported:
            return f"{row.title} does not support --{name} {value}: use --{name} {supported[0]}, or --compiler tensorrt"
    return None


def machine_refusal(
    manifest: Manifest, options: EngineOptions, machine: Machine, row: Compiler = COMPILERS["tensorrt"]
) -> str | None:
    """Return why this machine cannot build for the requested GPU; None if it can."""
    card = gpu(options.gpu)
    if row.targets:
        return _ahead_of_time_refusal(row)
    if machine.device is None:
        return (
            f"a plan must be built on its own GPU, and this machine has none: run this on {card.title}, or pass "
            "--check to see what would be built"
        )
    if machine.device.name != card.name:
        here = machine.device.name
        other = f"use --gpu {here}" if here else "the kit does not support it"
        return f"--gpu {card.name}, but this machine has {machine.device.title}: {other}"
    if machine.tensorrt is None:
        return "TensorRT is not installed: pip install tensorrt-cu13"
    if not row.supports(machine.tensorrt):
        return f"TensorRT {machine.tensorrt} is installed; the kit builds with {row.supported}"
    version = tuple(int(word) for word in machine.tensorrt.split(".")[:2])
    if manifest.options.get("attention") == "op" and version < ATTENTION:
        return (
            "the artifact uses the Attention operator, which needs TensorRT 10.14, this machine has "
            f"{machine.tensorrt}: export with --attention matmul or install a newer TensorRT"
        )
    return None


def _ahead_of_time_refusal(row: Compiler) -> str | None:
    """Return why a compiler that needs no GPU cannot build on this machine; None if it can."""
    found = installed(row)
    if found is None:
        return f"{row.title} is not installed: {row.install}"
    if not row.supports(found):
        return f"{row.title} {found} is installed; the kit builds with {row.supported}: {row.install}"
    return None
