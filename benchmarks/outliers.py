"""Compare the errors of all recipes on blocks of real width whose activations have outliers.

The model has one double and one single block of klein-4b's width. Its weights are random with the properties of trained
transformers: rows of very different size, and a few channels of the modulation, the values and the feed-forward that
are many times stronger than the rest. Every recipe is applied to the same export with the same calibration record, and
runs in ONNX Runtime on inputs that were not used for calibration.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import random_weights
from benchmarks.cpu_int8 import blocks_alone
from benchmarks.machine import describe
from kit.dtypes import numpy_type
from kit.safetensors_file import StoredTensor, read_header
from kit.variants import Variant

SIDE = 256  # pixels: 256 image tokens in addition to 512 text tokens
SEEN, UNSEEN = 4, 4  # seeds for calibration and for the comparison
STRONG_SHARE, STRENGTH = 0.003, 30.0  # fraction of channels, and their relative strength


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work", type=Path, default=Path("build/outliers"), metavar="DIR", help="work folder; needs 3 GB of disk"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Compare all recipes; errors are relative: deviation from fp32 divided by the size of fp32's output."""
    from export.artifact import ExportConfig, export
    from kit.artifact import read_manifest
    from kit.recipes import RECIPES, find_recipe
    from quantize.apply.apply import apply
    from quantize.calibration.calibrate import Calibration, calibrate
    from quantize.prompt_set import Prompt, PromptSet
    from runtimes.ort.engine import OrtEngine

    variant = blocks_alone(Variant.named("klein-4b"), 1, 1)
    checkpoint = random_weights.write(variant, args.work / "checkpoint")
    _strengthen(checkpoint, variant)
    export(checkpoint, args.work / "fp32", ExportConfig(parts=("transformer",)))
    prompts = PromptSet("one", (Prompt("one", "plain", "a red fox in the snow"),))
    config = Calibration(prompts, seeds=SEEN, steps=4, width=SIDE, height=SIDE, parts=("transformer",))
    seen = calibrate(checkpoint, config)
    inputs = [_inputs(variant, seed) for seed in range(100, 100 + UNSEEN)]

    def outputs(folder: Path) -> np.ndarray[Any, Any]:
        part = read_manifest(folder).part("transformer")
        engine = OrtEngine(folder / part.graph, part.ports)
        return np.stack([engine.run(arrays)["velocity"] for arrays in inputs])

    true = outputs(args.work / "fp32")
    own = {"int8-tensor": ("int8-plain", "int8-tensor")}  # comparison-only recipes: base and scheme of every layer
    facts: dict[str, Any] = {"seconds": 0, "errors": {}, "machine": describe()}
    for name in ("int8", "int8-plain", "int8-tensor", "fp8", "fp8-channel", "int8-weights", "int4-weights"):
        recipe = find_recipe(str(_recipe_file(args.work, name, *own[name]))) if name in own else RECIPES[name]
        made = apply(checkpoint.parent / "fp32", args.work / name, recipe, seen)
        error = outputs(args.work / name) - true
        facts["errors"][name] = {
            "relative_rms": float(np.sqrt((error**2).mean() / (true**2).mean())),
            "largest": float(np.abs(error).max() / np.abs(true).max()),
            "smoothed_sites": sum(part.smoothed for part in made.parts),
        }
    layers = seen.parts["transformer"]
    facts["outliers"] = {
        name: float(entry.amax / np.median(entry.channel_amax)) for name, entry in sorted(layers.items())
    }
    facts["smoothquant_gain"] = _ratio(facts, "int8-plain", "int8")
    facts["per_channel_gain"] = _ratio(facts, "int8-tensor", "int8-plain")
    facts.pop("seconds")
    return facts


def table(facts: dict[str, Any]) -> str:
    """Format the errors as a table."""
    lines = [f"{'':<14} {'relative RMS':>12} {'largest':>9}"]
    lines += [
        f"{name:<14} {row['relative_rms']:>12.4%} {row['largest']:>9.4%}" for name, row in facts["errors"].items()
    ]
    lines.append(
        f"SmoothQuant against plain int8: {facts['smoothquant_gain']:.2f} times less error; per channel against per "
        f"tensor: {facts['per_channel_gain']:.2f} times"
    )
    return "\n".join(lines)


def _ratio(facts: dict[str, Any], worse: str, better: str) -> float:
    return float(facts["errors"][worse]["relative_rms"] / facts["errors"][better]["relative_rms"])


def _recipe_file(work: Path, name: str, base: str, scheme: str) -> Path:
    path = work / f"{name}.json"
    rules = [
        {"part": "transformer", "layers": pattern, "scheme": scheme}
        for pattern in ("transformer_blocks.*", "single_transformer_blocks.*")
    ]
    path.write_text(json.dumps({"name": name, "base": base, "rules": rules}))
    return path


def _inputs(variant: Variant, seed: int) -> dict[str, Any]:
    from pipeline.position_ids import image_ids, text_ids

    rng = np.random.default_rng(seed)
    side = SIDE // variant.pixels_per_token
    return {
        "hidden_states": rng.standard_normal((1, side * side, 128), dtype=np.float32),
        "encoder_hidden_states": rng.standard_normal((1, 512, variant.transformer.joint_dim), dtype=np.float32),
        "timestep": np.array([rng.uniform(0.2, 1.0)], np.float32),
        "img_ids": image_ids(side, side)[None],
        "txt_ids": text_ids(512)[None],
    }


def _strengthen(checkpoint: Path, variant: Variant) -> None:
    """Scale the rows of matrices differently and make a few channels strong; done once per checkpoint."""
    mark = checkpoint / ".outliers"
    if mark.is_file():
        return
    rng = np.random.default_rng(1)
    dim, mlp = variant.transformer.dim, int(variant.transformer.dim * variant.transformer.mlp_ratio)
    strong = rng.random(dim) < STRONG_SHARE  # the same channels everywhere, as in a residual stream
    strong_mlp = rng.random(mlp) < STRONG_SHARE
    (file,) = (checkpoint / "transformer").glob("*.safetensors")
    with file.open("r+b") as stream:
        for tensor in read_header(file).values():
            if len(tensor.shape) != 2:
                continue
            size = np.exp(rng.standard_normal(tensor.shape[0]) * 0.5)
            for begin, channels in _channels(tensor.name, dim, mlp, strong, strong_mlp):
                size[begin : begin + len(channels)][channels] *= STRENGTH
            _scale_rows(stream, tensor, size.astype(np.float32))
    mark.touch()


def _channels(name: str, dim: int, mlp: int, strong: Any, strong_mlp: Any) -> list[tuple[int, Any]]:
    """Return the rows of a matrix that produce strong channels."""
    if "stream_modulation" in name:
        sets = 1 if "single" in name else 2
        return [((3 * i + 1) * dim, strong) for i in range(sets)]  # the scales; shifts and gates are unchanged
    if name.endswith(("to_v.weight", "add_v_proj.weight")):
        return [(0, strong)]
    if "linear_in" in name:
        return [(mlp, strong_mlp)]
    if "to_qkv_mlp_proj" in name:
        return [(2 * dim, strong), (3 * dim + mlp, strong_mlp)]
    return []


def _scale_rows(stream: Any, tensor: StoredTensor, size: Any) -> None:
    stream.seek(tensor.offset)
    values = np.frombuffer(stream.read(tensor.nbytes), numpy_type("bf16")).reshape(tensor.shape)
    scaled = (values.astype(np.float32) * size[:, None]).astype(numpy_type("bf16"))
    stream.seek(tensor.offset)
    stream.write(scaled.tobytes())
