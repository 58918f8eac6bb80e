"""What `benchmarks engine` compares: a runtime and what it runs, and the process in which it does."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from benchmarks.engine_worker import Case, TorchRuntime
from kit.artifact import read_manifest
from kit.checkpoint import resolve
from kit.configs import read_variant
from kit.errors import UsageError
from kit.graph_runtimes import GRAPH_RUNTIMES
from kit.recipes import RECIPES, Recipe
from kit.variants import Variant

PROGRAM = "from benchmarks.engine_worker import main; main()"
PEER = "optimum"  # optimum-intel's own OpenVINO pipeline, in an environment of its own


@dataclass(frozen=True)
class Contender:
    """A runtime and what it runs."""

    runtime: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.runtime} {Path(self.source).name}"


def command(contender: Contender, case: Case, variant: Variant, peer_python: Path | None) -> list[str]:
    """Return the command of a contender's process."""
    if contender.runtime != PEER:
        return [sys.executable, "-c", PROGRAM, contender.source, contender.runtime, json.dumps(asdict(case))]
    if peer_python is None:
        raise UsageError(f"{PEER}={contender.source} needs --optimum-python, the Python of its environment")
    if case.part != "transformer":
        raise UsageError(f"{PEER} runs the transformer alone, not the {case.part}")
    told = {**asdict(case), "text_tokens": variant.text_tokens}
    program = Path(__file__).with_name("engine_peer.py").read_text() + "\nmain()\n"
    return [str(peer_python), "-c", program, contender.source, json.dumps(told)]


def multiplies_in(contender: Contender) -> str:
    """Return the type of most of a contender's products."""
    if contender.runtime.endswith("bf16"):
        return "bf16"
    if contender.runtime.startswith("torch-") or contender.runtime == PEER:
        return "fp32"
    manifest = read_manifest(Path(contender.source))
    return "int8" if manifest.recipe.startswith("int8") else "fp32" if manifest.compute == "fp32" else "bf16"


def recipe_of(contender: Contender) -> Recipe:
    """Return the recipe of a contender's weights."""
    if contender.runtime.startswith("torch-") or contender.runtime == PEER:
        return RECIPES["bf16" if contender.runtime.endswith("bf16") else "fp32"]
    return RECIPES[read_manifest(Path(contender.source)).recipe]


def variant_of(contender: Contender) -> Variant:
    """Return the variant of a contender's artifact or checkpoint; raises UsageError if the source is none."""
    if contender.runtime.startswith("torch-"):
        return read_variant(resolve(contender.source))
    return read_manifest(Path(contender.source)).variant


def contenders_of(words: Sequence[str]) -> list[Contender]:
    """Parse RUNTIME=SOURCE; raises UsageError. The first one is the baseline, and an artifact or a checkpoint."""
    known = (*GRAPH_RUNTIMES, "own", *get_args(TorchRuntime), PEER)
    found: list[Contender] = []
    for word in words:
        runtime, equals, source = word.partition("=")
        if not equals or not source:
            raise UsageError(f"{word}: write RUNTIME=SOURCE, such as ort-cpu=build/sample")
        if runtime not in known:
            raise UsageError(f"{word}: unknown runtime {runtime!r}; there are: {', '.join(known)}")
        if runtime == PEER and not found:
            raise UsageError(f"{word} cannot be the baseline; name an artifact or a checkpoint before it")
        if runtime == PEER and not (Path(source) / "transformer" / "openvino_model.xml").is_file():
            raise UsageError(f"{source} is no folder that optimum-intel's pipeline saved: it has no transformer of it")
        found.append(Contender(runtime, source))
        if runtime != PEER:
            variant_of(found[-1])  # the source is one
    names = [contender.name for contender in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{twice} is named twice")
    return found
