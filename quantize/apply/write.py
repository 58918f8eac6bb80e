"""Write one quantized part: its weights, converted a few rows at a time, and its rewritten graph."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from kit.ports import PartName
from quantize.apply.plan import QuantizationPlan
from quantize.attention import quantize_attentions
from quantize.conversions import Conversion, Convert, Kept, Progress
from quantize.fold import fold
from quantize.linears import stored
from quantize.products import products
from quantize.rewrite import rewrite

FILE = "quantized.safetensors"


@dataclass(frozen=True)
class PartReport:
    """The result and cost of quantizing one part."""

    part: PartName
    seconds: float
    schemes: Mapping[str, int]  # scheme -> number of layers; "as it was" counts the layers that are not quantized
    smoothed: int  # number of inputs with SmoothQuant factors
    source_bytes: int
    written_bytes: int


def write_part(
    part: PartName,
    model: ir.Model,
    plan: QuantizationPlan,
    compute: ir.DataType,
    source: Path,
    graph: Path,
    start: Callable[[PartName, int], Progress],
    convert: Convert,
) -> PartReport:
    """Write the quantized weights of a part and its graph, at `graph`; the original weights are in `source`."""
    begin = time.perf_counter()
    folder = graph.parent
    linears = {linear.name: linear for change in plan.changes for linear in change.linears}
    factors = fold(model, plan.smoothings, linears, compute)
    replaced = {linear.weight.name for linear in linears.values()}
    left = [value for value in _external(model) if value.name not in replaced]
    made = [product for change in plan.changes for product in products(change, compute, cut=bool(plan.attentions))]
    jobs: list[Conversion] = [product.job for product in made]
    for value in left:
        assert isinstance(value.const_value, ir.ExternalTensor)
        jobs.append(Kept(stored(value.const_value, source), factors.get(value.name)))
    folder.mkdir(parents=True)
    total = sum(job.source_bytes for job in jobs)
    written = convert(jobs, folder / FILE, start(part, total))
    quantize_attentions(model, plan.attentions, compute)
    rewrite(model, made, written, compute)
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
    ir.save(model, graph)
    counts: Counter[str] = Counter()
    for change in plan.changes:
        counts[change.scheme_name] += len(change.linears)
    counts["as it was"] = sum(plan.kept.values())
    return PartReport(
        part=part,
        seconds=time.perf_counter() - begin,
        schemes=dict(counts),
        smoothed=sum(smoothing.alpha is not None for smoothing in plan.smoothings.values()),
        source_bytes=total,
        written_bytes=(folder / FILE).stat().st_size,
    )


def _external(model: ir.Model) -> Iterator[ir.Value]:
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            yield value
