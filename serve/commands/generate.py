"""The command `serve generate`: request images from a running server and save them."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kit.atomic_file import write_file
from kit.errors import RequestError, UsageError
from kit.outputs import STDOUT, check_out_file
from pipeline.edit_fields import STRENGTH
from pipeline.pictures import read_size
from pipeline.request import FIELDS, FORMATS

CHOSEN = ("prompt", "output_format", "response_encoding")  # by the position, by the suffix, and by the client
FILES = ("images", "mask")  # fields whose options name files

KINDS: Mapping[str, tuple[Callable[[str], Any], str]] = {  # of a field's values, and how help names them
    "TYPE_STRING": (str, "TEXT"),
    "TYPE_INT32": (int, "N"),
    "TYPE_INT64": (int, "N"),
    "TYPE_FP32": (float, "X"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; one for each field of a request."""
    from serve.tcp_ports import TcpPorts

    parser.add_argument("prompt", metavar="PROMPT", help="description of the image")
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="image to write, in the format of its suffix; - writes a PNG to stdout",
    )
    parser.add_argument(
        "--url", default=f"127.0.0.1:{TcpPorts.grpc}", metavar="HOST:PORT", help="the server's gRPC port"
    )
    for field in FIELDS:
        if field.name not in (*CHOSEN, *FILES):
            option = f"--{field.name.replace('_', '-')}"
            default = {"negative_prompt": "none", "num_images": "1", "strength": f"{STRENGTH:g}"}.get(
                field.name, "the variant's"
            )
            about = field.about if "default" in field.about else f"{field.about}; default: {default}"
            kind, metavar = (_numbers, "A,B,...") if field.many else KINDS[field.type]
            parser.add_argument(option, type=kind, metavar=metavar, help=about)
    parser.add_argument(
        "--image",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a reference image, PNG, JPEG or WebP; give it again for each further one, in the order of the prompt; "
        "default: none",
    )
    parser.add_argument(
        "--mask",
        type=Path,
        metavar="FILE",
        help="repaint the first --image where this image, which has its size, is white, and keep the rest; "
        "default: none",
    )
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="cancel the request after this time; default: no limit"
    )

    parser.add_argument(
        "--preview",
        type=Path,
        metavar="FILE.png",
        help="file in which a small preview of the image is kept while it is generated; default: none",
    )


def _numbers(text: str) -> list[float]:
    """Parse numbers between commas."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers separated by commas") from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Send the request, save the images and print the result; returns the files, the seed and the seconds."""
    from serve.client import Client, ImageResponse

    _check_preview(args)
    if args.timeout is not None and not args.timeout > 0:
        raise UsageError(f"--timeout {args.timeout:g}: must be more than 0 seconds")
    output_format = _output_format(args)
    wanted = {f.name: getattr(args, f.name) for f in FIELDS if f.name == "prompt" or f.name not in (*CHOSEN, *FILES)}
    wanted["output_format"] = output_format
    wanted["images"] = [_read("--image", path) for path in args.image] or None
    wanted["mask"] = None if args.mask is None else _read("--mask", args.mask)
    show = sys.stderr.isatty()

    done = ""

    def tick(seconds: float) -> None:
        if show:
            print(f"\rgenerating {done}{seconds:5.1f} s", end="", file=sys.stderr, flush=True)

    with Client(args.url) as client:
        try:
            if not show and args.preview is None:
                images = client.generate(wanted, timeout=args.timeout)
            else:
                start = time.perf_counter()
                for answer in client.stream(wanted, timeout=args.timeout, tick=tick):
                    if isinstance(answer, ImageResponse):
                        images = answer
                        break
                    done = f"step {answer.step} of {answer.steps} "
                    tick(time.perf_counter() - start)
                    if args.preview is not None and answer.preview is not None:
                        write_file(args.preview, answer.preview)
        finally:
            if show:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
    if str(args.out) == STDOUT:
        sys.stdout.buffer.write(images.images[0])
        sys.stdout.buffer.flush()
        print(f"seed {images.seed}  {images.seconds:.2f} s", file=sys.stderr)
        return {}
    paths = _paths(args.out, len(images.images))
    for path, image in zip(paths, images.images, strict=True):
        path.write_bytes(image)
    if not args.json:
        print(f"{', '.join(str(p) for p in paths)}  seed {images.seed}  {images.seconds:.2f} s")
    return {"images": [str(p) for p in paths], "seed": images.seed, "seconds": round(images.seconds, 3)}


def _read(option: str, path: Path) -> bytes:
    """Read an image that an option names; raises UsageError if it cannot be read or is none."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{option} {path}: {error.strerror}") from None
    try:
        read_size(data, f"{option} {path}")
    except RequestError as error:
        raise UsageError(str(error)) from None
    return data


def _check_preview(args: argparse.Namespace) -> None:
    """Raise UsageError if --preview names a file that cannot be written."""
    if args.preview is None:
        return
    if args.preview.suffix.lower() != ".png":
        raise UsageError(f"--preview {args.preview}: previews are PNG files; the suffix must be .png")
    check_out_file(args.preview, [args.out], option="--preview")


def _output_format(args: argparse.Namespace) -> str:
    """Return the format that --out selects; raises UsageError if it cannot be written."""
    out: Path = args.out
    if str(out) == STDOUT:
        if (args.num_images or 1) != 1:
            raise UsageError(f"--out -: stdout holds one image, not {args.num_images}; leave --num-images out")
        if args.json:
            raise UsageError("--out -: stdout holds the image, so --json cannot be combined with it")
        if sys.stdout.isatty():
            raise UsageError("--out -: stdout is a terminal; redirect it to a file or a program")
        return "png"
    suffix = out.suffix.lower().removeprefix(".")
    output_format: str = {"jpg": "jpeg"}.get(suffix, suffix)
    if output_format not in FORMATS:
        raise UsageError(f"--out {out}: the suffix must be one of .png, .jpg, .jpeg, .webp")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out {out}: cannot write into {out.parent}")
    check_out_file(out)
    return output_format


def _paths(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{n}{out.suffix}") for n in range(1, count + 1)]
