"""Quantize an artifact: give each linear layer a scheme, choose scales, stream the weights, rewrite the graphs."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from kit.artifact import (
    MANIFEST,
    Manifest,
    copy_texts,
    current,
    digest,
    link_or_copy,
    step_versions,
    verify,
    write_manifest,
)
from kit.atomic_folder import building
from kit.dtypes import onnx_type
from kit.errors import UsageError
from kit.gpus import Gpu
from kit.hardware import peak_rss_bytes
from kit.ports import KV_PARTS, QUANTIZED_PARTS, PartName
from kit.recipes import RECIPES, SCHEMES, Recipe
from quantize.calibration.record import Record, Seen, check, fingerprint
from quantize.fold import fold_modulation, norm_weight
from quantize.linears import Linear, find_linears, stored
from quantize.rewrite import Change, rewrite
from quantize.scales import LARGEST, SMALLEST_SCALE
from quantize.sites import sites
from quantize.smoothquant import Smoothing, activation_amax, choose_all
from quantize.stream import Conversion, Kept, Progress, Quantized, write

if TYPE_CHECKING:
    from torch import Tensor

REVISION = 1  # raised when the same artifact, recipe and record give another result
FILE = "quantized.safetensors"
NARROWEST = 16  # a matrix narrower than this has no fast kernel (TensorRT; ModelOpt skips it too)


@dataclass(frozen=True)
class PartReport:
    """What quantizing one part took and gave."""

    part: PartName
    seconds: float
    schemes: Mapping[str, int]  # layers of each, "as it was" included
    smoothed: int  # sites whose channels were balanced
    source_bytes: int
    written_bytes: int


@dataclass(frozen=True)
class ApplyReport:
    """What a run took and gave; `up_to_date` when the artifact was there already."""

    out: Path
    recipe: str
    up_to_date: bool
    seconds: float
    parts: tuple[PartReport, ...] = field(default=())
    left_out: tuple[PartName, ...] = ()  # parts of the source that the result does not have

    def facts(self) -> dict[str, Any]:
        """Return the report as plain data."""
        return asdict(self) | {"out": str(self.out), "peak_rss_bytes": peak_rss_bytes()}


@dataclass(frozen=True)
class QuantizationPlan:
    """What happens to the linear layers of one part."""

    changes: list[Change]
    smoothings: Mapping[str, Smoothing]
    kept: Mapping[str, int]  # why layers stay -> how many


def check_recipe(manifest: Manifest, recipe: Recipe, record: Record | None, gpu: Gpu | None) -> None:
    """Raise UsageError, with what to do, for a recipe that this artifact, record or GPU cannot have."""
    if not recipe.rules and recipe.name in ("fp32", "bf16") and recipe.name != manifest.compute:
        raise UsageError(
            f"recipe {recipe.name} changes no weight, and the artifact computes in {manifest.compute}: "
            f"export it with --dtype {recipe.name}"
        )
    if recipe.needs_calibration and record is None:
        raise UsageError(
            f"recipe {recipe.name} quantizes activations, which needs a calibration record: run "
            f"`python -m quantize calibrate CHECKPOINT --prompts kit --out cal.json` and add --calibration cal.json"
        )
    if gpu is not None:
        maths = {SCHEMES[rule.scheme].activations for rule in recipe.rules if rule.scheme in SCHEMES}
        for name in ("fp8", "int8"):
            refusal = gpu.refusal(name) if name in maths else None
            if refusal is not None:
                raise UsageError(refusal)


def apply(
    source: Path,
    out: Path,
    recipe: Recipe,
    record: Record | None = None,
    gpu: Gpu | None = None,
    start: Callable[[PartName, int], Progress] = lambda part, total: lambda done: None,
    done: Callable[[PartReport], None] = lambda report: None,
) -> ApplyReport:
    """Quantize the artifact at `source` by a recipe; the result stands at `out` whole or not at all.

    `start` is told of each part and the bytes that will be read, and returns what is told of progress. All layers of
    all parts are checked before anything is written. Raises UsageError for a record of other weights or a recipe that
    the artifact cannot have, ArtifactError for weights that are not finite.
    """
    begin = time.perf_counter()
    manifest = verify(source, ("onnx",))
    if out.resolve() == source.resolve():
        raise UsageError(f"--out {out} is the artifact that is to be quantized; choose another folder")
    check_recipe(manifest, recipe, record, gpu)
    if recipe.rules:  # the cache's graphs read reference images, of which no calibration knows yet
        parts = {part: found for part, found in manifest.parts.items() if part not in KV_PARTS}
        left_out = tuple(part for part in manifest.parts if part in KV_PARTS)
        manifest = replace(manifest, parts=parts)
    else:
        left_out = ()
    graphs = {part: ir.load(source / manifest.part(part).graph) for part in manifest.parts}
    plans = {
        part: plan(graphs[part], _home(source, manifest, part), part, manifest, recipe, record)
        for part in manifest.parts
        if part in QUANTIZED_PARTS
    }
    planned = _manifest(source, manifest, recipe, record, plans)
    if current(out, planned):
        return ApplyReport(out, recipe.name, True, time.perf_counter() - begin)
    reports = []
    with building(out) as folder:
        for part in manifest.parts:
            if part in plans and plans[part].changes:
                home = _home(source, manifest, part)
                made = _quantize(part, graphs[part], plans[part], manifest, home, folder / home.name, start)
                reports.append(made)
                done(reports[-1])
            else:
                home = _home(source, manifest, part)
                for file in sorted(home.iterdir()):
                    if not (folder / home.name / file.name).exists():  # graphs of the same weights share a folder
                        link_or_copy(file, folder / home.name / file.name)
        copy_texts(source, folder)
        write_manifest(folder, planned)
    return ApplyReport(out, recipe.name, False, time.perf_counter() - begin, tuple(reports), left_out)


def _home(folder: Path, manifest: Manifest, part: PartName) -> Path:
    """Return the folder in which a part's graph and weights lie."""
    return (folder / manifest.part(part).graph).parent


def plan(
    model: ir.Model, folder: Path, part: PartName, manifest: Manifest, recipe: Recipe, record: Record | None
) -> QuantizationPlan:
    """Decide on every linear layer of a part; nothing is written, and of the weights only samples are read."""
    linears = {linear.name: linear for linear in find_linears(model, folder)}
    _check_rules(recipe, part, linears)
    schemes: dict[str, str] = {}
    kept: Counter[str] = Counter()
    for name, linear in linears.items():
        scheme = recipe.scheme(part, name)
        reason = _reason_to_keep(linear, scheme)
        if reason is None and scheme is not None:
            schemes[name] = scheme
        else:
            kept[reason or "not in the recipe"] += 1
    seen = _seen(part, {name: linears[name] for name in schemes if SCHEMES[schemes[name]].activations}, record)
    smoothings: dict[str, Smoothing] = {}
    if recipe.smooth:
        smoothings = choose_all(list(sites(part, manifest.variant)), linears, schemes, seen)
    columns, rows = weight_factors(smoothings, linears)
    groups: dict[tuple[str, str], list[Linear]] = {}  # layers that read one activation and have one scheme
    for name, scheme in schemes.items():
        groups.setdefault((linears[name].activation.name or "", scheme), []).append(linears[name])
    changes = []
    for (_, scheme), group in groups.items():
        form, scale = SCHEMES[scheme], None
        factors = columns.get(group[0].name)
        if form.activations:
            amax = activation_amax(seen[group[0].name], factors, recipe.percentile)
            scale = max(amax / LARGEST[form.activations], SMALLEST_SCALE)
        job = Quantized(
            tuple(linear.weight for linear in group),
            form,
            tuple(linear.scale for linear in group),
            factors,
            _joined_rows(group, rows),
        )
        changes.append(Change(tuple(group), form, job, scale))
    return QuantizationPlan(changes, smoothings, dict(kept))


def _check_rules(recipe: Recipe, part: PartName, linears: Mapping[str, Linear]) -> None:
    """Refuse a rule of a recipe file that names no layer: one letter wrong, and a layer would be quantized unseen."""
    shipped = {rule for known in RECIPES.values() for rule in known.rules}
    for rule in recipe.rules:
        if rule.part == part and rule not in shipped and not any(fnmatchcase(name, rule.layers) for name in linears):
            raise UsageError(
                f"recipe {recipe.name}: {rule.layers!r} names no linear layer of the {part} that can be quantized; "
                f"such are {', '.join(list(linears)[:3])}"
            )


def _joined_rows(group: Sequence[Linear], rows: Mapping[str, Tensor]) -> Tensor | None:
    if not any(linear.name in rows for linear in group):
        return None
    import torch

    return torch.cat([rows.get(linear.name, torch.ones(linear.outputs)) for linear in group])


def _reason_to_keep(linear: Linear, scheme: str | None) -> str | None:
    if scheme is None:
        return "the recipe keeps it"
    if min(linear.inputs, linear.outputs) < NARROWEST:
        return f"narrower than {NARROWEST}"
    form = SCHEMES[scheme]
    if form.block and linear.inputs % form.block:
        return f"its inputs are no multiple of the block of {form.block}"
    if form.weights == "int4" and linear.outputs % 2:
        return "its outputs are odd, and two int4 codes share a byte"
    return None


def _seen(part: PartName, linears: Mapping[str, Linear], record: Record | None) -> Mapping[str, Seen]:
    """Return what the record says of the layers; raises UsageError where it is of other weights or says too little."""
    if not linears or record is None:
        return {}
    layers = record.parts.get(part, {})
    for name, linear in linears.items():
        if name not in layers:
            raise UsageError(
                f"the calibration record says nothing of {name} in the {part}; calibrate again with --parts {part}"
            )
        if layers[name].channel_amax.shape != (linear.inputs,):
            raise UsageError(
                f"the calibration record is malformed: {name} in the {part} has {len(layers[name].channel_amax)} "
                f"channels, its weight has {linear.inputs}; calibrate again"
            )
        if layers[name].weight != fingerprint(linear.weight):
            raise UsageError(
                f"the calibration record is of another checkpoint: {name} in the {part} has other weights; calibrate "
                f"the checkpoint that was exported, with the same --lora"
            )
        check(name, layers[name], "the calibration record")
    return layers


def weight_factors(
    smoothings: Mapping[str, Smoothing], linears: Mapping[str, Linear]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what multiplies the columns and the rows of each weight."""
    import torch

    columns: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for smoothing in smoothings.values():
        if smoothing.alpha is None:
            continue
        for name in smoothing.site.readers:
            columns[name] = smoothing.factors
        inverse = smoothing.inverse
        if smoothing.site.heads is not None:  # query heads that share a key head have one factor
            keys, queries, width = smoothing.site.heads
            inverse = inverse.view(keys, queries, width)[:, 0].reshape(-1)
        for part in smoothing.site.rows:
            made = rows.setdefault(part.layer, torch.ones(linears[part.layer].outputs))
            made[part.begin : part.begin + part.count] *= inverse[part.channel : part.channel + part.count]
    return columns, rows


def _quantize(
    part: PartName,
    model: ir.Model,
    plan: QuantizationPlan,
    manifest: Manifest,
    source: Path,
    folder: Path,
    start: Callable[[PartName, int], Progress],
) -> PartReport:
    """Write weights and graph of one part, from the folder where they lie to a new one."""
    begin = time.perf_counter()
    compute = onnx_type(manifest.compute)
    linears = {linear.name: linear for change in plan.changes for linear in change.linears}
    factors = fold(model, plan.smoothings, linears, compute)
    replaced = {linear.weight.name for linear in linears.values()}
    left = [value for value in _external(model) if value.name not in replaced]
    jobs: list[Conversion] = [change.job for change in plan.changes]
    for value in left:
        assert isinstance(value.const_value, ir.ExternalTensor)
        jobs.append(Kept(stored(value.const_value, source), factors.get(value.name)))
    folder.mkdir(parents=True)
    total = sum(job.source_bytes for job in jobs)
    written = write(jobs, folder / FILE, start(part, total))
    rewrite(model, plan.changes, written, compute)
    for value in left:
        place, old = written[value.name or ""], value.const_value
        assert isinstance(old, ir.ExternalTensor)
        value.const_value = ir.ExternalTensor(
            location=FILE,
            offset=place.offset,
            length=place.nbytes,
            dtype=old.dtype,
            shape=old.shape,
            name=value.name or "",
            base_dir="",
        )
    ir.save(model, folder / Path(manifest.part(part).graph).name)
    counts: Counter[str] = Counter()
    for change in plan.changes:
        counts[_name_of(change)] += len(change.linears)
    counts["as it was"] = sum(plan.kept.values())
    return PartReport(
        part=part,
        seconds=time.perf_counter() - begin,
        schemes=dict(counts),
        smoothed=sum(smoothing.alpha is not None for smoothing in plan.smoothings.values()),
        source_bytes=total,
        written_bytes=(folder / FILE).stat().st_size,
    )


def fold(
    model: ir.Model, smoothings: Mapping[str, Smoothing], linears: Mapping[str, Linear], compute: ir.DataType
) -> dict[str, Tensor]:
    """Divide activations in the graph where that is the place; returns what divides norm weights, by their name."""
    factors = {}
    for smoothing in smoothings.values():
        if smoothing.alpha is None or smoothing.site.fold == "rows":
            continue
        reader = linears[smoothing.site.readers[0]]
        _check_readers(reader, smoothing)
        if smoothing.site.fold == "modulation":
            fold_modulation(model, reader, smoothing.inverse, compute)
        else:
            factors[norm_weight(reader).name or ""] = smoothing.inverse
    return factors


def _name_of(change: Change) -> str:
    return next(name for name, scheme in SCHEMES.items() if scheme == change.scheme)


def _check_readers(reader: Linear, smoothing: Smoothing) -> None:
    """Make sure that what is smoothed is read by nothing that does not know of it."""
    users = {(use.node.name or "").rpartition("/")[0] for use in reader.activation.uses()}
    if users != set(smoothing.site.readers):
        raise AssertionError(f"{reader.activation.name} is read by {sorted(users)}, not {smoothing.site.readers}")


def _external(model: ir.Model) -> Iterator[ir.Value]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value


def _manifest(
    source: Path, manifest: Manifest, recipe: Recipe, record: Record | None, plans: Mapping[PartName, QuantizationPlan]
) -> Manifest:
    layers = {
        part: {
            linear.name: {"scheme": _name_of(change), "activation_scale": change.scale}
            for change in plan.changes
            for linear in change.linears
        }
        for part, plan in plans.items()
    }
    smoothing = {
        site: {"alpha": smoothing.alpha, "expected_gain": round(smoothing.gain, 3)}
        for plan in plans.values()
        for site, smoothing in plan.smoothings.items()
    }
    return replace(
        manifest,
        kind="quantized",
        recipe=recipe.name,
        options=json.loads(json.dumps({**manifest.options, "layers": layers, "smoothing": smoothing})),
        source={
            **manifest.source,
            "parent": digest(source / MANIFEST),
            "weights": {file: (source / file).stat().st_mtime_ns for file in manifest.files if _holds_weights(file)},
            "calibration": record.digest if record is not None and recipe.needs_calibration else None,
            "calibration_prompts": record.marks if record is not None and recipe.needs_calibration else [],
        },
        versions={**manifest.versions, **step_versions("quantize", REVISION, "torch", "onnx-ir")},
        files={},
    )


def _holds_weights(file: str) -> bool:
    """Tell weight files by their name: a digest covers their header alone, so a time stamp must tell of new values."""
    return file.endswith(".safetensors")
