"""One contender of `benchmarks engine` in a process of its own, which waits between its visits.

Reads a line for each visit, the seconds to spend, and answers with a JSON list of the seconds of each call; at the end
of its input it answers with its peak memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kit.artifact import Manifest, read_manifest
from kit.checkpoint import resolve
from kit.dtypes import numpy_type, torch_type
from kit.engine import Array
from kit.errors import UsageError
from kit.graph_runtimes import GRAPH_RUNTIMES, GraphRuntime
from kit.image_size import PIXELS_PER_TOKEN
from kit.ports import PartName, Ports, ports
from kit.variants import Variant
from pipeline.position_ids import image_ids, text_ids

TorchRuntime = Literal["torch-fp32", "torch-bf16", "torch-compile-fp32", "torch-compile-bf16"]
FEWEST_CALLS = 3  # of a visit
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """What every contender computes."""

    part: PartName
    width: int
    height: int
    rows: int
    threads: int


def arrays(part: Ports, variant: Variant, case: Case) -> dict[str, Array]:
    """Return inputs of a part: random activations and token ids, true position ids, equal for all contenders."""
    chance = np.random.default_rng(0)
    height, width = case.height // PIXELS_PER_TOKEN, case.width // PIXELS_PER_TOKEN
    sizes = {
        "batch": case.rows,
        "image_tokens": height * width,
        "latent_height": height,
        "latent_width": width,
    }
    fixed: dict[str, Callable[[], Any]] = {
        "img_ids": lambda: image_ids(height, width),
        "txt_ids": lambda: text_ids(variant.text_tokens),
        "attention_mask": lambda: np.ones(variant.text_tokens, np.int64),
        "input_ids": lambda: chance.integers(0, variant.text_encoder.vocab, variant.text_tokens),
        "timestep": lambda: np.float32(0.5),
        "guidance": lambda: np.float32(3.5),
    }
    made: dict[str, Array] = {}
    for port in part.inputs:
        shape = port.shape(sizes)
        value = fixed[port.name]() if port.name in fixed else chance.standard_normal(shape).astype(np.float32)
        made[port.name] = np.ascontiguousarray(np.broadcast_to(value, shape)).astype(numpy_type(port.dtype))
    return made


def open_call(source: str, runtime: str, case: Case) -> Callable[[], Any]:
    """Return a call of a part: of an artifact by a runtime of graphs or its own, or of a checkpoint by torch."""
    if runtime.startswith("torch-"):
        return _torch_call(resolve(source), runtime, case)
    folder = Path(source)
    manifest = read_manifest(folder)
    engine = _engine(folder, manifest, runtime, case)
    given = arrays(engine.ports, manifest.variant, case)
    return lambda: engine.run(given)


def _engine(folder: Path, manifest: Manifest, runtime: str, case: Case) -> Any:
    from runtimes.open import open_parts

    own = manifest.kind in ("engine", "aoti")
    chosen: Mapping[str, GraphRuntime] = {name: name for name in GRAPH_RUNTIMES}
    if own != (runtime == "own") or (not own and runtime not in chosen):
        kinds = "its own" if own else ", ".join(GRAPH_RUNTIMES)
        raise UsageError(f"{folder} is of kind {manifest.kind} and is run by {kinds}, not by {runtime}")
    arguments = {} if own else {"runtime": chosen[runtime]}
    (engine,) = open_parts(folder, manifest, (case.part,), case.threads, **arguments).values()
    return engine


def _torch_call(checkpoint: Path, runtime: str, case: Case) -> Callable[[], Any]:
    """Return a forward pass of diffusers' transformer."""
    import torch
    from diffusers import Flux2Transformer2DModel

    from kit.configs import read_variant

    if case.part != "transformer":
        raise UsageError(f"{runtime} runs the transformer alone, not the {case.part}")
    if case.threads:
        torch.set_num_threads(case.threads)
    dtype = torch_type(runtime.rpartition("-")[2])
    model = Flux2Transformer2DModel.from_pretrained(checkpoint / "transformer", torch_dtype=dtype).eval()
    variant = read_variant(checkpoint)
    given = {
        name: torch.from_numpy(a) for name, a in arrays(ports("transformer", variant, "fp32"), variant, case).items()
    }
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    inputs |= {name: given[name][0] for name in ("img_ids", "txt_ids")}
    forward: Any = torch.compile(model) if "compile" in runtime else model

    def call() -> None:
        with torch.inference_mode():
            forward(**inputs)

    return call


def visit(call: Callable[[], Any], seconds: float) -> list[float]:
    """Call for so many seconds, and at least a few times; returns the seconds of each call."""
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < FEWEST_CALLS or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("source", "runtime", "case"):
        parser.add_argument(name)
    args = parser.parse_args()
    _forget_peak()
    try:
        call = open_call(args.source, args.runtime, Case(**json.loads(args.case)))
        for _ in range(WARM_UP):
            call()
    except Exception as error:  # told to the process that asked, which names the contender
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)
        return
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(visit(call, float(line))), flush=True)
    print(json.dumps({"peak": _peak_memory()}), flush=True)


def _forget_peak() -> None:
    """Reset the count of the peak memory: Linux counts that of the process which started this one."""
    Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
