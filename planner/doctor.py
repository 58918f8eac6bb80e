"""Command `kit doctor`: report what this machine has and which tasks of the kit it can run, with which recipe."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kit import software
from kit.artifact import verify
from kit.certificate import quality
from kit.compilers import COMPILERS, Compiler, missing_libraries
from kit.compilers import installed as installed_version
from kit.cuda_device import CudaDevice
from kit.gpus import GPUS, Gpu
from kit.hardware import Hardware, look
from kit.ports import SERVED_PARTS
from kit.providers import PROVIDERS, Provider
from kit.recipes import RECIPES, recipe
from kit.variants import VARIANTS, Variant
from planner.feasible import Build, refusal
from planner.memory import Shape, activation_bytes, gigabytes, weight_bytes
from planner.shared_memory import Traffic, problem, shared_bytes

GPU_PROVIDERS = tuple(row for row in PROVIDERS.values() if row.on_gpu)
CPU_RECIPES: tuple[str, ...] = ("fp32", "int8")


@dataclass(frozen=True)
class Verdict:
    """One task of the kit: whether this machine can do it, and how or why not."""

    work: str
    can: bool
    words: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; the command inspects the machine it runs on."""
    parser.add_argument(
        "artifacts", type=Path, nargs="*", metavar="DIR", help="artifacts and deployments to verify; default: none"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Inspect the machine, judge every task and print the result."""
    hardware, installed = look(Path.cwd()), software.versions()
    providers, server = software.providers(), software.tritonserver(installed)
    found = verdicts(hardware, installed, providers, server)
    judged = [_artifact(folder) for folder in args.artifacts]
    if not args.json:
        from planner.text import coloured

        print(render(hardware, installed, providers, server, found, coloured()))
        for one in judged:
            print(
                f"artifact {one['folder']}: {one['kind']}, {one['variant']}, {one['recipe']}; quality: {one['quality']}"
            )
    return {
        **asdict(hardware),
        "versions": installed,
        "onnxruntime_providers": list(providers),
        "tritonserver": server,
        "can": [asdict(verdict) for verdict in found],
        "artifacts": judged,
    }


def _artifact(folder: Path) -> dict[str, Any]:
    """Verify an artifact and say what is known about its quality; raises ArtifactError if it does not verify."""
    manifest = verify(folder)
    return {
        "folder": str(folder),
        "kind": manifest.kind,
        "variant": manifest.variant.name,
        "recipe": manifest.recipe,
        "quality": quality(folder, manifest),
    }


def verdicts(
    hardware: Hardware, installed: Mapping[str, str], providers: Sequence[str], server: str | None
) -> tuple[Verdict, ...]:
    """Judge every task."""
    return (
        _export(installed),
        *(_engine(device, hardware, installed) for device in hardware.gpus),
        *(() if hardware.gpus else (Verdict("build and run TensorRT engines", False, str(hardware.gpu_problem)),)),
        *(_compiler(row, hardware) for row in COMPILERS.values()),
        *(_provider(row, device, providers) for row in GPU_PROVIDERS for device in hardware.gpus),
        *(() if hardware.gpus else (_no_provider(hardware, providers),)),
        _cpu(hardware, providers),
        _serve(installed, server, hardware.shared_free),
    )


def _serve(installed: Mapping[str, str], server: str | None, shared_free: int | None) -> Verdict:
    work, numpy = "serve with Triton", installed.get("numpy", "1")
    if server is None:
        return Verdict(work, False, NO_SERVER)
    if software.SERVER in server and int(numpy.split(".")[0]) >= 2:
        return Verdict(work, False, f"numpy {numpy}: the server of {software.SERVER} needs numpy 1.26")
    small = problem(shared_free, shared_bytes(VARIANTS["klein-4b"], "bf16", Traffic()))
    return Verdict(work, True, f"tritonserver {server}" + (f"; but for klein-4b {small}" if small else ""))


NO_SERVER = "no tritonserver on PATH; run in NVIDIA's container, or pip install nvidia-pytriton for one on the CPU"


def render(
    hardware: Hardware,
    installed: Mapping[str, str],
    providers: Sequence[str],
    server: str | None,
    found: Sequence[Verdict],
    colour: bool,
) -> str:
    """Render the report as text."""
    from planner.text import GREEN, RED, colorize

    cpu = hardware.cpu
    lines = [
        f"cpu     {cpu.name}, {cpu.cores} cores; {', '.join(cpu.features) or 'no relevant instruction sets'}",
        f"memory  {gigabytes(hardware.memory)}, {gigabytes(hardware.memory_available)} available",
        f"disk    {gigabytes(hardware.disk_free)} free here"
        + ("" if hardware.shared_free is None else f", {gigabytes(hardware.shared_free)} of shared memory"),
    ]
    for device in hardware.gpus:
        name = device.known.name if device.known else "not in the kit's table"
        lines.append(
            f"gpu     {device.title} ({name}), {gigabytes(device.memory_bytes)}, {gigabytes(device.free_bytes)} free, "
            f"compute capability {device.capability}, driver {device.driver}"
        )
    if not hardware.gpus:
        lines.append(f"gpu     none: {hardware.gpu_problem}")
    lines += [
        f"python  {', '.join(f'{name} {version}' for name, version in installed.items()) or 'no package the kit uses'}",
        f"onnxruntime providers: {', '.join(providers) or 'none'}",
        f"tritonserver: {server or 'none'}",
        "",
    ]
    for verdict in found:
        mark = colorize("can   ", GREEN, colour) if verdict.can else colorize("cannot", RED, colour)
        lines.append(f"{mark}  {verdict.work}: {verdict.words}")
    return "\n".join(lines)


def _export(installed: Mapping[str, str]) -> Verdict:
    missing = [name for name in software.EXPORT if name not in installed]
    words = f"missing: {', '.join(missing)}" if missing else "all variants, no GPU needed, under 1 GB of memory"
    return Verdict("export to ONNX", not missing, words)


def _engine(device: CudaDevice, hardware: Hardware, installed: Mapping[str, str]) -> Verdict:
    work = f"build and run TensorRT engines on {device.title}"
    wheel = software.tensorrt(installed)
    if device.known is None:
        return Verdict(work, False, "this GPU is not in the kit's table; to compare the GPUs in it: kit plan --gpu all")
    if wheel is None:
        return Verdict(
            work, False, f"no TensorRT wheel: pip install tensorrt-cu13 (recipe {device.known.default_recipe})"
        )
    return Verdict(work, True, f"{wheel}; {_fitting(device.known, hardware.disk_free)}")


def _compiler(row: Compiler, hardware: Hardware) -> Verdict:
    """Say for which GPUs a compiler can build plans on this machine, and what it lacks."""
    work = f"compile plans with {row.title} (--compiler {row.name})"
    here = [device.known.name for device in hardware.gpus if device.known]
    targets = here if row.needs_gpu else [gpu.name for gpu in GPUS.values() if row.can_target(gpu)]
    found = installed_version(row)
    if found is None:
        lacks = missing_libraries(row) or f"not installed: {row.install}"
        return Verdict(work, False, f"{lacks}; it builds for {', '.join(targets) or 'the GPU of its machine'}")
    if not row.supports(found):
        return Verdict(work, False, f"{found} is installed, the kit builds with {row.supported}: {row.install}")
    if not targets:
        why = hardware.gpu_problem
        return Verdict(work, False, f"{found} needs the GPU that a plan is for, and finds none: {why}")
    how = "on this machine's GPU" if row.needs_gpu else "without a GPU"
    return Verdict(work, True, f"{found}, {how}: {', '.join(targets)}")


def _provider(row: Provider, device: CudaDevice, providers: Sequence[str]) -> Verdict:
    work = f"run ONNX Runtime on {device.title} (--runtime ort-{row.name})"
    if row.targets and device.capability not in row.targets:
        known = ", ".join(row.targets)
        return Verdict(work, False, f"{row.title} runs on compute capability {known}, this GPU has {device.capability}")
    if row.title not in providers:
        return Verdict(work, False, f"no {row.title}: {row.install}")
    return Verdict(work, True, f"{row.title} is installed; the planner has no figures for its speed")


def _no_provider(hardware: Hardware, providers: Sequence[str]) -> Verdict:
    there = [row.title for row in GPU_PROVIDERS if row.title in providers]
    words = f"installed: {', '.join(there)}" if there else f"no provider for one: {GPU_PROVIDERS[0].install}"
    return Verdict("run ONNX Runtime on a GPU", False, f"{hardware.gpu_problem}; {words}")


def _fitting(gpu: Gpu, disk_free: int) -> str:
    """List the variants that can be built with the GPU's recipe, and the reason why the first other one cannot."""
    name = gpu.default_recipe
    refused = {v.name: refusal(Build(v, name, gpu, disk_free=disk_free)) for v in VARIANTS.values()}
    good = [variant for variant, reason in refused.items() if reason is None]
    first = next((reason for reason in refused.values() if reason), None)
    return f"{name}: {', '.join(good) or 'nothing'}" + (f"; {first}" if first else "")


def _cpu(hardware: Hardware, providers: Sequence[str]) -> Verdict:
    work = "run on the CPU with ONNX Runtime"
    if "CPUExecutionProvider" not in providers:
        return Verdict(work, False, "no ONNX Runtime: pip install onnxruntime")
    fast = hardware.cpu.int8
    parts = []
    for name in CPU_RECIPES:
        fits = [v.name for v in VARIANTS.values() if cpu_bytes(v, name) <= hardware.memory_available]
        parts.append(f"{name}: {', '.join(('the sample', *fits))}")
    speed = f"int8 is fast here ({', '.join(fast)})" if fast else "int8 is slow here (no VNNI or AMX)"
    return Verdict(work, True, f"{'; '.join(parts)} fit into the available memory at 512x512; {speed}")


def cpu_bytes(variant: Variant, name: str) -> int:
    """Return the memory of all parts in fp32 or int8 at 512x512, with fp32 activations as in ONNX Runtime."""
    chosen, fp32 = recipe(name), RECIPES["fp32"]
    stored = sum(weight_bytes(part, variant, chosen) for part in SERVED_PARTS)
    return stored + max(activation_bytes(part, variant, fp32, Shape(512, 512)) for part in SERVED_PARTS)
