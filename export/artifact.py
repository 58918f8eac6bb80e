"""Export a checkpoint: find its weights, trace its parts and write the artifact."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from export.graphs.attention import Attention
from export.lora.merge import MERGEABLE, check_parts, merge, record
from export.lora.terms import Lora
from export.node_report import Counts, count_nodes
from export.parts import PARTS as SOURCES
from export.passes import simplify
from export.single_file import has_decoder_alone, sizes_of_vae
from export.trace import OPSET, FakePart
from export.weights import Binding, attach, find
from kit.artifact import TEXTS, Manifest, PartRecord, current, digest, link_or_copy, step_versions, write_manifest
from kit.atomic_folder import building
from kit.configs import read_variant
from kit.dtypes import Compute
from kit.errors import CheckpointError, UsageError
from kit.hardware import peak_rss_bytes
from kit.outputs import ONNX, check_out
from kit.ports import PartName, parts_of
from kit.tokenizer_files import load_tokenizer
from kit.variants import Variant

REVISION = 2  # increment when the same checkpoint and options produce a different artifact
TEXT_SUFFIXES = (".json", ".jinja", ".txt", ".model")
TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")


@dataclass(frozen=True)
class ExportConfig:
    """What to export and how."""

    parts: tuple[PartName, ...] | None = None  # None: all parts of the variant
    dtype: Compute = "fp32"
    attention: Attention = "matmul"
    loras: tuple[Lora, ...] = ()
    single_files: Mapping[str, Path] = field(default_factory=dict)  # by the folder they replace: transformer, vae, ...
    weights: str | None = None  # the variant of the weight files in folders, such as bf16


@dataclass(frozen=True)
class PartReport:
    """Cost and output of exporting one part."""

    part: PartName
    seconds: float
    nodes: int
    graph_bytes: int
    linked_bytes: int
    copied_bytes: int
    derived_bytes: int = 0  # weights that are not a byte range of the source: merged or reordered
    nodes_traced: Counts = field(default_factory=dict)  # one block of each kind, before any pass
    nodes_exported: Counts = field(default_factory=dict)  # one block of each kind, after all passes


@dataclass(frozen=True)
class ExportReport:
    """Cost and output of an export; `up_to_date` means that the artifact already existed and nothing was done."""

    out: Path
    variant: str
    up_to_date: bool
    seconds: float
    parts: tuple[PartReport, ...] = field(default=())

    def facts(self) -> dict[str, Any]:
        """Return the report as plain data."""
        facts = asdict(self) | {"out": str(self.out), "peak_rss_bytes": peak_rss_bytes()}
        for total in ("graph_bytes", "linked_bytes", "copied_bytes", "derived_bytes"):
            facts[total] = sum(getattr(part, total) for part in self.parts)
        return facts


def export(
    checkpoint: Path, out: Path, config: ExportConfig, progress: Callable[[PartReport], None] = lambda part: None
) -> ExportReport:
    """Export a checkpoint folder to an ONNX artifact; `progress` is called after each part.

    All weights of all parts are located before anything is traced or written. An existing artifact at `out` is kept if
    the same revision made it from the same files with the same options. Raises CheckpointError for a checkpoint that
    does not match its configs, and UsageError for a path that cannot be written.
    """
    begin = time.perf_counter()
    read = [checkpoint, *config.single_files.values(), *(lora.file for lora in config.loras)]
    check_out(out, ONNX, read)
    variant = read_variant(checkpoint)
    if vae_file := config.single_files.get("vae"):
        variant = replace(variant, vae=sizes_of_vae(vae_file, variant.vae))
    parts = _chosen(config.parts, variant)
    if "text_encoder" in parts:  # a server that encodes texts needs it
        load_tokenizer(checkpoint / "tokenizer", CheckpointError)
    plan = Manifest(
        kind="onnx",
        variant=variant,
        compute=config.dtype,
        recipe=config.dtype,
        options={"opset": OPSET, "attention": config.attention},
        source=_source(checkpoint, config, parts),
        parts={},
        versions=step_versions("export", REVISION, *TOOLS),
    )
    fakes = {part: FakePart(part, variant, config.dtype, config.attention) for part in parts}
    bindings: dict[str, Binding] = {}  # keyed by the artifact folder that will hold the weights
    for part, fake in fakes.items():
        if SOURCES[part].home not in bindings:
            single_file = config.single_files.get(SOURCES[part].folder)
            bindings[SOURCES[part].home] = find(part, variant, checkpoint, fake.shapes(), single_file, config.weights)
    if config.loras:
        check_parts(config.loras, variant, bindings)
        for changed in MERGEABLE:
            if changed in bindings:
                bindings[changed] = merge(bindings[changed], config.loras, variant, changed)
    plan = replace(
        plan,
        source={**plan.source, **_stamps(bindings)},
        parts={part: PartRecord(SOURCES[part].graph, fake.ports) for part, fake in fakes.items()},
    )
    if is_current(out, plan, bindings):
        return ExportReport(out, variant.name, True, time.perf_counter() - begin)
    reports = []
    with building(out, ONNX, read) as folder:
        placed: dict[str, PlacedWeights] = {}
        for part, fake in fakes.items():
            started = time.perf_counter()
            home = SOURCES[part].home
            weights = placed[home].shared() if home in placed else _place(bindings[home], folder / home)
            placed[home] = weights
            reports.append(_export_part(fake, weights, folder, started))
            progress(reports[-1])
        for source in texts(checkpoint):
            target = folder / source.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        if variant.text_encoder.kind == "mistral3":
            (folder / "tokenizer").mkdir(exist_ok=True)  # an export without the text encoder may have none
            (folder / "tokenizer" / "system_message.txt").write_text(system_message())
        write_manifest(folder, plan)
    return ExportReport(out, variant.name, False, time.perf_counter() - begin, tuple(reports))


def system_message() -> str:
    """Return the message that diffusers puts before dev's prompts; artifacts hold it for servers without diffusers."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE

    return str(SYSTEM_MESSAGE)


def _chosen(parts: tuple[PartName, ...] | None, variant: Variant) -> tuple[PartName, ...]:
    """Return the parts to export; raises UsageError for a part that the variant does not have."""
    known = parts_of(variant)
    for part in parts or ():
        if part not in known:
            raise UsageError(f"{variant.name} has no {part}; it has: {', '.join(known)}")
    return parts or known


def is_current(out: Path, plan: Manifest, bindings: Mapping[str, Binding]) -> bool:
    """Return whether the artifact at `out` is what the plan would produce.

    The digest of a weight file covers its header only, so the weights themselves are compared by identity: the file in
    the artifact must be the checkpoint's own (a hard link), or a copy with the same size and modification time.
    """
    return current(out, plan) and all(
        _same_weights(file, out / home / file.name) for home, binding in bindings.items() for file in binding.files
    )


def _same_weights(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    if source.samefile(target):
        return True
    a, b = source.stat(), target.stat()
    return (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)


@dataclass(frozen=True)
class PlacedWeights:
    """Weights placed in a folder of the artifact, with the bytes that were linked, copied and derived."""

    binding: Binding
    linked_bytes: int
    copied_bytes: int
    derived_bytes: int

    def shared(self) -> PlacedWeights:
        """Return the same weights for another graph in the folder, at no further cost."""
        return PlacedWeights(self.binding, 0, 0, 0)


def _place(binding: Binding, folder: Path) -> PlacedWeights:
    """Link or copy the weight files of a graph into its folder and write its derived tensors."""
    folder.mkdir()
    moved: Counter[str] = Counter()
    settled = binding.settle(folder)
    for file in binding.files:
        moved[link_or_copy(file, folder / file.name)] += file.stat().st_size
    derived = sum(tensor.nbytes for tensor in binding.derived.values())
    return PlacedWeights(settled, moved["linked"], moved["copied"], derived)


def _export_part(fake: FakePart, weights: PlacedWeights, folder: Path, begin: float) -> PartReport:
    """Trace one part, attach its weights and write its graph."""
    model = fake.trace()
    traced = count_nodes(model)
    simplify(model)
    attach(model, weights.binding)
    graph = folder / SOURCES[fake.part].graph
    ir.save(model, graph)
    return PartReport(
        part=fake.part,
        seconds=time.perf_counter() - begin,
        nodes=len(model.graph),
        graph_bytes=graph.stat().st_size,
        linked_bytes=weights.linked_bytes,
        copied_bytes=weights.copied_bytes,
        derived_bytes=weights.derived_bytes,
        nodes_traced=traced,
        nodes_exported=count_nodes(model),
    )


def texts(checkpoint: Path) -> list[Path]:
    """List the config and tokenizer files that are copied into an artifact."""
    roots = [checkpoint / name for name in TEXTS]
    files = [root for root in roots if root.is_file()]
    files += [file for root in roots if root.is_dir() for file in root.rglob("*") if file.suffix in TEXT_SUFFIXES]
    return sorted(files)


def _source(checkpoint: Path, config: ExportConfig, parts: tuple[PartName, ...]) -> dict[str, Any]:
    """Compute the digests of the files that an export reads: configs and text by content, weights by header."""
    folders = sorted({SOURCES[part].folder for part in parts})
    singles = {folder: file for folder, file in config.single_files.items() if folder in folders}
    files = set(texts(checkpoint))
    for folder in folders:
        files.update(checkpoint.glob(f"{folder}/*.json"))
        if folder not in singles or (folder == "vae" and has_decoder_alone(singles[folder])):
            files.update(checkpoint.glob(f"{folder}/*.safetensors"))
    source: dict[str, Any] = {
        "checkpoint": checkpoint.name,
        "files": {str(file.relative_to(checkpoint)): digest(file) for file in sorted(files)},
    }
    if singles:
        source["single_files"] = {k: {"file": file.name, "digest": digest(file)} for k, file in singles.items()}
    if config.loras:
        source["loras"] = record(config.loras)
    return source


def _stamps(bindings: Mapping[str, Binding]) -> dict[str, Any]:
    """Record the modification times of files that weights or scales are computed from: these may not be linked."""
    files = {tensor.source.file for binding in bindings.values() for tensor in binding.derived.values()}
    files |= {s.source.file for binding in bindings.values() for s in binding.scales.values() if s.source}
    return {"computed_from": {file.name: file.stat().st_mtime_ns for file in sorted(files)}} if files else {}
