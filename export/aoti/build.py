"""Compile a checkpoint with AOTInductor into packages that a server runs without diffusers and without compiling.

The modules are those exported to ONNX, with the projections of queries, keys and values joined, torch's own attention
kernels and, for an 8-bit recipe, quantized linear layers in the blocks. Compiled code has fixed shapes, so there is one
package per bucket. Packages hold no weights; all packages of a part share one safetensors file. Unlike the weights of
an ONNX artifact, this file is written from scratch: joined and quantized weights are not byte ranges of the checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from export.aoti import RECIPES
from export.aoti.linears import LINEARS, quantize_linears
from export.aoti.package import compile_package, example
from export.artifact import TOOLS, system_message, texts
from export.graphs.fusion import fuse_projections
from export.lora.terms import Lora
from export.meta_part import assign, meta_part
from export.parts import MODULE
from export.torch_part import bind, tensors
from kit.artifact import Manifest, PartRecord, digest, step_versions, write_manifest
from kit.atomic_folder import building
from kit.configs import read_variant
from kit.dtypes import Compute, torch_type
from kit.errors import UsageError
from kit.image_size import side_problem
from kit.outputs import AOTI, check_out
from kit.ports import SERVED_PARTS, PartName, ServedPart, ports
from kit.recipes import recipe
from kit.variants import Variant
from runtimes.aoti.engine import WEIGHTS, this_processor, this_torch
from runtimes.aoti.record import INDEX

REVISION = 1  # increment when the same checkpoint and options produce different packages


@dataclass(frozen=True)
class AotConfig:
    """What to compile: shapes, number format and device."""

    sizes: tuple[tuple[int, int], ...] = ((1024, 1024),)  # width, height
    batches: tuple[int, ...] = (1,)  # rows of a call; classifier-free guidance uses two per image
    recipe: str = "bf16"
    device: str = "cuda"
    parts: tuple[ServedPart, ...] = SERVED_PARTS
    loras: tuple[Lora, ...] = ()
    single_files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def compute(self) -> Compute:
        return recipe(self.recipe).compute


@dataclass(frozen=True)
class Package:
    """One compiled package."""

    part: ServedPart
    sizes: Mapping[str, int]
    bytes: int
    seconds: float


def compile_artifact(
    checkpoint: Path, out: Path, config: AotConfig, progress: Callable[[Package], None] = lambda package: None
) -> list[Package]:
    """Compile all packages of an artifact; `progress` is called after each package.

    Raises UsageError for an invalid size, recipe or device, and the same CheckpointErrors as an export.
    """
    check(config)
    read = [checkpoint, *config.single_files.values(), *(lora.file for lora in config.loras)]
    check_out(out, AOTI, read)
    variant = read_variant(checkpoint)
    made: list[Package] = []
    bindings = {
        part: bind(part, variant, checkpoint, config.single_files.get(part), config.loras) for part in config.parts
    }
    with building(out, AOTI, read) as folder:
        records: dict[PartName, PartRecord] = {}
        for part in config.parts:
            wired = ports(part, variant, config.compute)
            module = _module(part, variant, config, dict(tensors(bindings[part])))
            home = folder / part
            home.mkdir()
            packages = []
            for sizes in buckets(part, variant, config):
                name = "-".join(f"{axis}{size}" for axis, size in sizes.items()) + ".pt2"
                begin = time.perf_counter()
                compile_package(module, example(wired, sizes, config.device), home / name)
                seconds = time.perf_counter() - begin
                made.append(Package(part, sizes, (home / name).stat().st_size, seconds))
                packages.append({"file": name, "sizes": sizes})
                progress(made[-1])
            _write_weights(module, home / WEIGHTS)
            (home / INDEX).write_text(json.dumps({"packages": packages}, indent=1) + "\n")
            records[part] = PartRecord(f"{part}/{INDEX}", wired)
            del module
        for source in texts(checkpoint):
            target = folder / source.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        if variant.text_encoder.kind == "mistral3":
            (folder / "tokenizer" / "system_message.txt").write_text(system_message())
        write_manifest(folder, _manifest(variant, checkpoint, config, records))
    return made


def check(config: AotConfig) -> None:
    """Raise UsageError for a config that cannot be compiled, before anything is loaded."""
    if config.recipe not in RECIPES:
        raise UsageError(f"--recipe {config.recipe}: not available in torch; there are: {', '.join(RECIPES)}")
    if config.device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {config.device}: torch finds no CUDA GPU here; use --device cpu")
    for width, height in config.sizes:
        if problem := side_problem(width) or side_problem(height):
            raise UsageError(f"--sizes {width}x{height}: {problem}")
    if not config.batches or min(config.batches) < 1:
        raise UsageError(f"--batches {','.join(map(str, config.batches))}: every batch must be 1 or more")


def buckets(part: ServedPart, variant: Variant, config: AotConfig) -> list[dict[str, int]]:
    """List the sizes for which a part is compiled; images of equal area share the transformer's packages."""
    batches = sorted(set(config.batches))
    match part:
        case "text_encoder":
            return [{"batch": batch} for batch in batches]
        case "transformer":
            tokens = sorted({variant.tokens(*size) for size in config.sizes})
            return [{"batch": b, "image_tokens": n} for n, b in product(tokens, batches)]
        case "vae_decoder":
            per = variant.pixels_per_token
            places = sorted({(height // per, width // per) for width, height in config.sizes})
            return [{"batch": b, "latent_height": h, "latent_width": w} for (h, w), b in product(places, batches)]


def _module(part: ServedPart, variant: Variant, config: AotConfig, weights: Mapping[str, Tensor]) -> nn.Module:
    """Build a part with its weights on the device, joined and quantized according to the recipe."""
    module: Any = meta_part(part, variant, config.compute)
    for name, weight in weights.items():
        assign(module, MODULE + name, weight.to(torch_type(config.compute)))
    if part == "transformer":
        fuse_projections(module.model.transformer_blocks)
    if config.recipe in LINEARS and part != "vae_decoder":
        quantize_linears(module, config.recipe)
    placed: nn.Module = module.to(config.device)
    return placed


def _write_weights(module: nn.Module, path: Path) -> None:
    """Write all parameters and buffers, including computed constants: a package looks them up by these names."""
    from safetensors.torch import save_file

    held = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in held.items()}, path)


def _manifest(
    variant: Variant, checkpoint: Path, config: AotConfig, records: Mapping[PartName, PartRecord]
) -> Manifest:
    gpu = torch.cuda.get_device_name() if config.device.startswith("cuda") else None
    options = {
        "device": config.device,
        "gpu": gpu,
        "processor": this_processor(config.device),
        "torch": this_torch(),
        "fused": "qkv",
        "attention": "sdpa",
    }
    read = {str(file.relative_to(checkpoint)): digest(file) for file in sorted(checkpoint.rglob("*.safetensors"))}
    single = {folder: {"file": file.name, "digest": digest(file)} for folder, file in config.single_files.items()}
    return Manifest(
        kind="aoti",
        variant=variant,
        compute=config.compute,
        recipe=config.recipe,
        options=options,
        source={"checkpoint": checkpoint.name, "files": read, "single_files": single},
        parts=records,
        versions=step_versions("aoti", REVISION, *TOOLS),
    )


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Read "1024x1024,512x768"."""
    sizes: Sequence[Sequence[str]] = [word.strip().lower().split("x") for word in text.split(",")]
    if not all(len(pair) == 2 and all(side.isdigit() for side in pair) for pair in sizes):
        raise UsageError(f"--sizes {text}: expected comma-separated WIDTHxHEIGHT, for example 1024x1024,512x768")
    return tuple((int(width), int(height)) for width, height in sizes)
