"""Compare klein-4b in int8 on a CPU with diffusers: seconds per transformer step, and memory of the whole pipeline.

The first two measurements use random weights, on which times and memory do not depend:
- a ratio: a transformer of real width with a subset of the blocks runs in diffusers (fp32 and bf16) and, quantized, in
  ONNX Runtime, in turns within one run, each in a persistent process; the time of a step is linear in the blocks;
- the whole klein-4b in int8 except the VAE: one image through the server's step loop, with the peak memory;
- the shipped sample with trained weights, in fp32 and in int8 in turns: seconds per step and per image.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import random_weights
from benchmarks.machine import describe
from kit.dtypes import torch_type
from kit.hardware import peak_rss_bytes
from kit.variants import Variant

SIDE, STEPS = 512, 4
ONLY = ("ratio", "whole", "sample")
STEPS_OF = {  # the implementations of a step
    "fp32": "diffusers fp32",
    "bf16": "diffusers bf16",
    "uncut": "ONNX Runtime int8, products whole",
    "int8": "ONNX Runtime int8",
}
PROMPT = "a red fox in the snow, early morning light"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work", type=Path, default=Path("build/cpu-int8"), metavar="DIR", help="work folder; needs 45 GB of disk"
    )
    parser.add_argument(
        "--double-blocks", type=int, metavar="N", default=1, help="double blocks of the compared transformer"
    )
    parser.add_argument(
        "--single-blocks", type=int, metavar="N", default=4, help="single blocks of the compared transformer"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", default=5, help="rounds of the comparison; ratios are medians"
    )
    parser.add_argument("--only", choices=ONLY, help="run only this measurement; default: all")
    parser.add_argument("--attention", choices=("matmul", "op"), default="matmul", help="as in `export onnx`")
    parser.add_argument("--worker", choices=(*STEPS_OF, "whole"), help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the measurements; as a worker, answer each line on stdin with one line."""
    if args.worker == "whole":
        return _generate(args.work / "whole-int8")
    if args.worker:
        _step_worker(args.work, args.worker)
        return {}
    weights = "random but for the sample's"
    facts: dict[str, Any] = {"side": SIDE, "steps": STEPS, "weights": weights, "machine": describe()}
    measures = {"ratio": _ratio, "whole": _whole, "sample": _sample}
    for name in [args.only] if args.only else ONLY:
        facts[name] = measures[name](args)
    return facts


def table(facts: dict[str, Any]) -> str:
    """Format the measurements as lines of text."""
    lines = []
    if "ratio" in facts:
        ratio = facts["ratio"]
        lines.append(f"one step at {SIDE}x{SIDE}, {ratio['blocks']}, median of {len(ratio['round_seconds'])} rounds:")
        lines += [f"  {name:<34} {seconds:7.2f} s" for name, seconds in ratio["seconds"].items()]
        lines.append(
            f"  int8 is {ratio['of_fp32']:.2f} times as fast as fp32, {ratio['of_bf16']:.2f} times as bf16, "
            f"{ratio['of_uncut']:.2f} times as with whole products"
        )
    if "whole" in facts:
        whole = facts["whole"]
        lines.append(
            f"klein-4b whole, int8: {whole['steps_seconds']:.1f} s for {STEPS} steps, {whole['seconds']:.1f} s per "
            f"image, loaded in {whole['load_seconds']:.1f} s, peak memory {whole['peak_rss_gb']:.2f} GB"
        )
    if "sample" in facts:
        sample = facts["sample"]
        lines.append(f"the sample at its own size, median of {sample['images']} images of each in turns:")
        for name in ("fp32", "int8"):
            lines.append(f"  {name}: {sample[name]['step']:.2f} ms per step, {sample[name]['image']:.1f} ms per image")
        lines.append(f"  int8 steps are {sample['step_ratio']:.2f} times as fast")
    return "\n".join(lines)


def _prepare(variant: Variant, work: Path, name: str, parts: str, attention: str) -> Path:
    """Export and quantize a checkpoint with random weights; returns the artifact."""
    checkpoint = random_weights.write(variant, work / f"{name}-checkpoint")
    artifact, record, out = work / f"{name}-onnx", work / f"{name}-calibration.json", work / f"{name}-int8"
    every = ("--parts", parts) if parts else ()
    _command("export", "onnx", str(checkpoint), "--out", str(artifact), "--attention", attention, *every)
    if not record.is_file():
        prompts = work / "prompt.txt"
        prompts.write_text(PROMPT + "\n")
        calibrated = ("--parts", parts) if parts else ()
        size = ("--width", "256", "--height", "256", "--steps", "2")
        where = ("--prompts", str(prompts), "--out", str(record))
        _command("quantize", "calibrate", str(checkpoint), *where, *size, *calibrated)
    _command("quantize", "apply", str(artifact), "--recipe", "int8", "--calibration", str(record), "--out", str(out))
    return out


def _command(*words: str) -> None:
    print(f"python -m {' '.join(words)}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", *words], stdout=sys.stderr, check=True)


def blocks_alone(variant: Variant, double: int, single: int) -> Variant:
    """Return a variant with some blocks of real width and a text encoder too narrow to matter."""
    text = replace(variant.text_encoder, hidden=64, layers=28, heads=2, kv_heads=1, head_dim=32, ffn=128, vocab=600)
    sizes = replace(variant.transformer, double_blocks=double, single_blocks=single, joint_dim=3 * text.hidden)
    return replace(variant, transformer=sizes, text_encoder=text)


def _worker(args: argparse.Namespace, kind: str) -> subprocess.Popen[str]:
    words = ["cpu", "--work", str(args.work), "--worker", kind]
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _ratio(args: argparse.Namespace) -> dict[str, Any]:
    klein = Variant.named("klein-4b")
    part = blocks_alone(klein, args.double_blocks, args.single_blocks)
    _prepare(part, args.work, "step", "transformer", args.attention)
    workers = {kind: _worker(args, kind) for kind in STEPS_OF}
    rounds = []
    try:
        for worker in workers.values():
            _ask(worker)  # load and warm up
        for _ in range(args.rounds):
            rounds.append({kind: _ask(worker) for kind, worker in workers.items()})
    finally:
        for worker in workers.values():
            worker.stdin.close() if worker.stdin else None
            worker.wait(60)
    return {
        "blocks": f"{args.double_blocks} double and {args.single_blocks} single blocks of klein-4b's width",
        "round_seconds": rounds,
        "seconds": {name: _median([turn[kind] for turn in rounds]) for kind, name in STEPS_OF.items()},
        "of_fp32": _median([turn["fp32"] / turn["int8"] for turn in rounds]),
        "of_bf16": _median([turn["bf16"] / turn["int8"] for turn in rounds]),
        "of_uncut": _median([turn["uncut"] / turn["int8"] for turn in rounds]),
        "attention": args.attention,
    }


def _ask(worker: subprocess.Popen[str]) -> float:
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError("a worker process ended; see its message above")
    return float(line)


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _step_worker(work: Path, kind: str) -> None:
    """Answer every line on stdin with the seconds of one step; the first answer follows loading and a warm-up."""
    step = _diffusers_step(work, kind) if kind in ("fp32", "bf16") else _onnx_step(work, panels=kind == "int8")
    warm = True
    for _ in sys.stdin:
        if warm:
            step()
            warm = False
        begin = time.perf_counter()
        step()
        print(time.perf_counter() - begin, flush=True)


def _arrays(joint_dim: int) -> dict[str, Any]:
    import numpy as np

    from pipeline.position_ids import image_ids, text_ids

    rng = np.random.default_rng(0)
    side = SIDE // Variant.pixels_per_token
    return {
        "hidden_states": rng.standard_normal((1, side * side, 128), dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 512, joint_dim), dtype=np.float32),
        "timestep": np.array([0.5], np.float32),
        "img_ids": image_ids(side, side)[None],
        "txt_ids": text_ids(512)[None],
    }


def _onnx_step(work: Path, panels: bool = True) -> Any:
    from kit.artifact import read_manifest
    from runtimes.ort.engine import OrtEngine

    folder = work / "step-int8"
    part = read_manifest(folder).part("transformer")
    engine = OrtEngine(folder / part.graph, part.ports, panels=panels)
    arrays = _arrays(read_manifest(folder).variant.transformer.joint_dim)
    return lambda: engine.run(arrays)


def _diffusers_step(work: Path, kind: str) -> Any:
    import torch
    from diffusers import Flux2Transformer2DModel

    dtype = torch_type(kind)
    model = Flux2Transformer2DModel.from_pretrained(work / "step-checkpoint" / "transformer", torch_dtype=dtype).eval()
    given = {name: torch.from_numpy(array) for name, array in _arrays(model.config.joint_attention_dim).items()}
    inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    inputs |= {"img_ids": given["img_ids"][0], "txt_ids": given["txt_ids"][0]}

    def step() -> None:
        with torch.inference_mode():
            model(**inputs)

    return step


def _whole(args: argparse.Namespace) -> dict[str, Any]:
    _prepare(Variant.named("klein-4b"), args.work, "whole", "", args.attention)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "cpu", "--work", str(args.work), "--worker", "whole", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def _sample(args: argparse.Namespace) -> dict[str, Any]:
    """Generate with the sample in fp32 and in int8, one image of each in turn; returns milliseconds."""
    from pipeline.local import LocalPipeline

    onnx, record = args.work / "sample", args.work / "sample-calibration.json"
    folders = {"fp32": onnx, "int8": args.work / "sample-int8"}
    _command("export", "onnx", "sample", "--out", str(onnx))
    _command("quantize", "calibrate", "sample", "--prompts", "sample:64:7", "--batch", "8", "--out", str(record))
    made = ("--recipe", "int8", "--calibration", str(record), "--out", str(folders["int8"]))
    _command("quantize", "apply", str(onnx), *made)
    pipelines = {name: LocalPipeline(folder) for name, folder in folders.items()}
    fields = {"prompt": "a red circle on a white background", "seed": 1}
    steps: dict[str, list[float]] = {name: [] for name in pipelines}
    images: dict[str, list[float]] = {name: [] for name in pipelines}
    for name, pipeline in pipelines.items():
        pipeline.generate(fields)
        _time_steps(pipeline, steps[name])
    for _ in range(10 * args.rounds):
        for name, pipeline in pipelines.items():
            begin = time.perf_counter()
            pipeline.generate(fields)
            images[name].append(time.perf_counter() - begin)
    found = {name: {"step": 1e3 * _median(steps[name]), "image": 1e3 * _median(images[name])} for name in pipelines}
    ratios = [fp32 / int8 for fp32, int8 in zip(steps["fp32"], steps["int8"], strict=True)]
    return {"images": len(images["int8"]), **found, "step_ratio": _median(ratios)}


def _time_steps(pipeline: Any, seconds: list[float]) -> None:
    """Record the duration of every later step of a pipeline."""
    step = pipeline.denoiser.step

    def timed(jobs: Any) -> None:
        start = time.perf_counter()
        step(jobs)
        seconds.append(time.perf_counter() - start)

    pipeline.denoiser.step = timed


def _generate(folder: Path) -> dict[str, Any]:
    """Generate one image with a whole artifact in this process."""
    from pipeline.local import LocalPipeline

    begin = time.perf_counter()
    pipeline = LocalPipeline(folder)
    loaded = time.perf_counter()
    job_seconds: list[float] = []
    _time_steps(pipeline, job_seconds)
    generated = pipeline.generate({"prompt": PROMPT, "seed": 1, "width": SIDE, "height": SIDE, "steps": STEPS})
    seconds = time.perf_counter() - loaded
    return {
        "load_seconds": loaded - begin,
        "seconds": seconds,
        "step_seconds": job_seconds,
        "steps_seconds": sum(job_seconds),
        "pixels_deviation": float(generated.pixels.std()),
        "peak_rss_gb": peak_rss_bytes() / 1e9,
    }
