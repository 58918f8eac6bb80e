"""`quantize calibrate`: run a checkpoint over prompts and write a calibration record."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from export.onnx_command import CHECKPOINT_HELP
from kit.errors import UsageError
from kit.outputs import check_out_file, checkpoint_files, file_of
from kit.ports import QUANTIZED_PARTS

FEW = 64  # the sample in int8: 50.1 to 51.8 dB by the choice of 24 prompts, 52.8 to 53.2 with 64 (docs/quantization.md)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help=f"as in `export onnx`: {CHECKPOINT_HELP}")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="calibration record to write, JSON")
    parser.add_argument("--prompts", default="kit", metavar="SET", help="kit, kit:N, sample:N, or a file")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="images per prompt")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps; default: the variant's")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="width of the images; default: the checkpoint's")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="height of the images; default: the checkpoint's")
    parser.add_argument("--parts", default=",".join(QUANTIZED_PARTS), metavar="A,B", help="parts to record")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="compute type; default: the type of the stored weights"
    )
    parser.add_argument("--device", default="cpu", metavar="DEVICE", help="cpu, cuda or cuda:N")
    parser.add_argument(
        "--offload",
        choices=("none", "layers"),
        default="none",
        help="layers: keep the weights in host memory and copy each layer to the GPU when it runs",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images per call")
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[=WEIGHT]", help="as in `export onnx`; default: none"
    )
    parser.add_argument("--config", metavar="CHECKPOINT", help="as in `export onnx`; default: none")
    parser.add_argument("--transformer", metavar="FILE", help="as in `export onnx`; default: none")
    parser.add_argument("--text-encoder", metavar="FILE", help="as in `export onnx`; default: none")
    parser.add_argument("--variant", metavar="NAME", help="as in `export onnx`; default: none")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate the checkpoint, write the record and return the facts."""
    for name in ("seeds", "batch"):
        if getattr(args, name) < 1:
            raise UsageError(f"--{name} {getattr(args, name)} is not positive")
    check_out_file(args.out, [file_of(args.prompts), *checkpoint_files(args)])
    parts = tuple(word.strip() for word in args.parts.split(",") if word.strip())
    from quantize import prompt_set
    from quantize.calibration import record

    record.check_replaceable(args.out)

    prompts = prompt_set.load(args.prompts)
    from export.lora.terms import Lora
    from export.sources import find_sources

    loras = tuple(Lora.parse(text) for text in args.lora)
    sources = find_sources(
        args.checkpoint, QUANTIZED_PARTS, args.config, args.transformer, text_encoder=args.text_encoder
    )
    from tqdm import tqdm

    from quantize.calibration.calibrate import (  # imports torch, so only once the arguments are known to be valid
        Calibration,
        calibrate,
    )

    config = Calibration(
        prompts=prompts,
        seeds=args.seeds,
        steps=args.steps,
        width=args.width,
        height=args.height,
        parts=parts,  # checked by calibrate
        dtype=args.dtype,
        device=args.device,
        offload=args.offload,
        loras=loras,
        batch=args.batch,
        single_files=sources.single_files,
        weights=args.variant,
    )
    begin = time.perf_counter()
    with tqdm(unit="run", disable=not sys.stderr.isatty(), leave=False) as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.set_description(what)
            bar.total, bar.n = total, done
            bar.refresh()

        found = calibrate(sources.checkpoint, config, progress)
    record.write(found, args.out)
    seconds = time.perf_counter() - begin
    layers = {part: len(entries) for part, entries in found.parts.items()}
    counts = ", ".join(f"{count} layers of the {part}" for part, count in layers.items())
    images = len(prompts.prompts) * args.seeds
    print(f"{args.out}: {found.variant}, {counts}; {images} images in {seconds:.1f} s")
    if images < FEW:
        print(
            f"warning: only {images} images: activations larger than any of theirs will be clipped; "
            f"calibrate on {FEW} or more, or merge this record with others",
            file=sys.stderr,
        )
    return {
        "out": str(args.out),
        "variant": found.variant,
        "layers": layers,
        "digest": found.digest,
        "seconds": seconds,
        "runs": list(found.runs),
    }
