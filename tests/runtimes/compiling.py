"""Compile whole artifacts with TensorRT for RTX: a process of its own, because a process holds one TensorRT.

    python -m tests.runtimes.compiling WORK < cases.jsonl

A case is {"family", "dtype", "attention", "recipe", "gpu"}, and "parts" if not all are built. For each, a line of JSON
says what `export engine` checks before a build, and for each part what the compiler says: null for a plan, else the
first words of its refusal. Sizes are fixed, which compiles in half the time of a range and a size.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, get_args

from kit.errors import Flux2Error, UsageError
from kit.ports import ALL_PARTS
from kit.variants import Family

FAMILIES: tuple[Family, ...] = get_args(Family)
GPUS = ("a100-40g", "a10g", "l4", "rtx5090")  # compute capability 8.0, 8.6, 8.9, 12.0
RECIPES = ("fp8", "fp8-channel", "int8", "int8-plain", "int8-weights", "int4-weights")
FORMS = (("bf16", "matmul"), ("bf16", "op"), ("fp32", "matmul"), ("fp32", "op"))


def every() -> list[dict[str, str]]:
    """List every family, type, form of attention and recipe that can be exported, for every GPU."""
    return [
        {"family": family, "dtype": dtype, "attention": attention, "recipe": recipe, "gpu": gpu}
        for family, (dtype, attention), gpu in itertools.product(FAMILIES, FORMS, GPUS)
        for recipe in ((dtype, *RECIPES) if dtype == "bf16" else (dtype,))
    ]


def selected() -> list[dict[str, str]]:
    """List a selection in which every value of every field appears, and every recipe on two GPUs."""
    words = [
        "klein bf16 matmul bf16 a10g",
        "klein bf16 matmul fp8 l4 transformer",
        "klein bf16 matmul fp8 a100-40g transformer",
        "klein bf16 matmul fp8-channel rtx5090 transformer",
        "klein bf16 matmul int8 a100-40g transformer,text_encoder",
        "klein bf16 matmul int8-plain l4 transformer",
        "klein bf16 matmul int8-weights a10g transformer",
        "klein bf16 matmul int4-weights a10g transformer,text_encoder",
        "klein bf16 matmul int4-weights l4 transformer",
        "klein bf16 op bf16 a100-40g transformer,vae_decoder",
        "klein fp32 matmul fp32 rtx5090 transformer",
        "klein fp32 op fp32 l4 transformer",
        "klein-base bf16 matmul bf16 l4 transformer",
        "dev bf16 matmul fp8 rtx5090 transformer,text_encoder",
        "klein-kv bf16 matmul bf16 l4 transformer_extract,transformer_cached",
    ]
    fields = ("family", "dtype", "attention", "recipe", "gpu", "parts")
    return [dict(zip(fields, word.split(), strict=False)) for word in words]


class Artifacts:
    """Tiny checkpoints of each family, exported and quantized once."""

    def __init__(self, work: Path, cases: list[dict[str, str]]) -> None:
        self.work = work
        self.parts: dict[str, set[str]] = {}  # that are needed of an export; with "", all
        for case in cases:
            name = "-".join(case[key] for key in ("family", "dtype", "attention"))
            self.parts.setdefault(name, set()).update(case.get("parts", "").split(","))

    def checkpoint(self, family: Any) -> Path:
        from kit import tiny

        out = self.work / "checkpoints" / family
        return out if out.is_dir() else tiny.save(out, tiny.Tiny(family))

    def exported(self, family: str, dtype: Any, attention: Any) -> Path:
        from export.artifact import ExportConfig, export

        out = self.work / f"{family}-{dtype}-{attention}"
        wanted = self.parts[out.name]
        parts = None if "" in wanted else tuple(part for part in ALL_PARTS if part in wanted)
        export(self.checkpoint(family), out, ExportConfig(parts, dtype, attention))
        return out

    def quantized(self, family: str, dtype: str, attention: str, recipe: str) -> Path:
        from benchmarks.sparse_quantized import synthetic_record
        from kit.recipes import RECIPES as KNOWN
        from quantize.apply.apply import apply

        source = self.exported(family, dtype, attention)
        if recipe == dtype:
            return source
        out = source.with_name(f"{source.name}-{recipe}")
        if not out.is_dir():
            apply(source, out, KNOWN[recipe], synthetic_record(source))
        return out


def compile_case(case: dict[str, str], artifacts: Artifacts, scratch: Path) -> dict[str, Any]:
    """Check and compile one case."""
    from kit.compilers import COMPILERS
    from runtimes.trt.build.artifact import check
    from runtimes.trt.build.build import build_plan
    from runtimes.trt.build.options import EngineOptions, planned
    from runtimes.trt.profiles import Sizing

    begin = time.perf_counter()
    artifact = artifacts.quantized(case["family"], case["dtype"], case["attention"], case["recipe"])
    options = EngineOptions(
        case["gpu"],
        parts=tuple(filter(None, case.get("parts", "").split(","))),  # type: ignore[arg-type]
        sizing=Sizing((128,), max_batch=1, min_side=128),
        compiler="tensorrt-rtx",
    )
    refused: str | None = None
    try:
        check(artifact, options, scratch / "engine")
    except UsageError as error:
        refused = str(error)
    from kit.artifact import read_manifest

    manifest = read_manifest(artifact)
    compiled: dict[str, str | None] = {}
    missed: list[str] = []
    for plan in planned(manifest, options):
        record = manifest.part(plan.part)
        try:
            made = build_plan(
                plan,
                artifact / record.graph,
                record.ports,
                options,
                scratch / "model.plan",
                None,
                lambda fraction, phase: None,
                COMPILERS["tensorrt-rtx"],
            )
            compiled[plan.part] = None
            missed += made.layers["missed"]
        except Flux2Error as error:
            compiled[plan.part] = str(error)[:300]
    return {**case, "refused": refused, "compiled": compiled, "missed": missed, "seconds": time.perf_counter() - begin}


def main() -> int:
    """Compile the cases on stdin; returns the exit code."""
    from kit.compilers import COMPILERS, activate

    work = Path(sys.argv[1])
    scratch = work / "plans"
    scratch.mkdir(parents=True, exist_ok=True)
    activate(COMPILERS["tensorrt-rtx"])
    cases = [json.loads(line) for line in sys.stdin]
    artifacts = Artifacts(work, cases)
    for case in cases:
        print(json.dumps(compile_case(case, artifacts, scratch)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
