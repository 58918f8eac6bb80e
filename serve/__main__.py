"""Command line: python -m serve repository | run | generate."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from kit.cli import report
from kit.errors import CheckFailed, UsageError
from serve.request import FORMATS, Limits
from serve.settings import KnownAnswer, Tuning


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    return report(lambda: args.step(args), args.json)


def _parser() -> argparse.ArgumentParser:
    from serve.launch import Ports

    parser = argparse.ArgumentParser(prog="python -m serve", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    repository = commands.add_parser("repository", help="write a Triton model repository from an exported artifact")
    repository.add_argument(
        "artifact", type=Path, metavar="DIR", help="what `export onnx`, `quantize apply` or `export engine` wrote"
    )
    repository.add_argument("--out", type=Path, required=True, metavar="DIR")
    for group, defaults in (("what requests may ask for", Limits()), ("how the machine is used", Tuning())):
        section = repository.add_argument_group(group)
        for item in fields(defaults):
            value = getattr(defaults, item.name)
            section.add_argument(
                f"--{item.name.replace('_', '-')}",
                type=type(value),
                default=value,
                metavar="N",
                help=f"default {value}",
            )
    repository.add_argument(
        "--known-answer",
        choices=get_args(KnownAnswer),
        default="paint",
        help="what the server must paint before it is ready; none: write a deployment where its engines do not load",
    )
    repository.set_defaults(step=_repository)

    serve = commands.add_parser("run", help="run a deployment on Triton; ends with Ctrl-C")
    serve.add_argument("deployment", type=Path, metavar="DEPLOY")
    serve.add_argument("--host", default=Ports.host, help=f"address to listen on; default {Ports.host}, loopback only")
    for name in ("http", "grpc", "metrics"):
        serve.add_argument(f"--{name}-port", type=int, default=getattr(Ports, name), metavar="PORT")
    serve.add_argument("--tritonserver", type=Path, help="the binary to run; default: PATH, then nvidia-pytriton's")
    serve.set_defaults(step=_run)

    generate = commands.add_parser("generate", help="ask a running server for a picture")
    generate.add_argument("prompt")
    generate.add_argument("--out", type=Path, required=True, metavar="FILE", help="its suffix chooses the format")
    generate.add_argument("--url", default=f"127.0.0.1:{Ports.grpc}", help="HOST:PORT of gRPC")
    generate.add_argument("--negative-prompt")
    for name, kind in (("seed", int), ("width", int), ("height", int), ("steps", int), ("guidance", float)):
        generate.add_argument(f"--{name}", type=kind)
    generate.add_argument("--num-images", type=int)
    generate.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after; default: wait")
    generate.set_defaults(step=_generate)
    for command in (repository, serve, generate):
        command.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    return parser


def _chosen(args: argparse.Namespace, cls: type[Any]) -> Any:
    values = {item.name: getattr(args, item.name) for item in fields(cls)}
    for name, value in values.items():
        if value < (0 if name in ("threads", "max_guidance") else 1):
            raise UsageError(f"--{name.replace('_', '-')} {value}: too small")
    return cls(**values)


def _repository(args: argparse.Namespace) -> dict[str, Any]:
    from serve.repository import write_repository

    limits, tuning = _chosen(args, Limits), _chosen(args, Tuning)
    manifest = write_repository(args.artifact, args.out, limits, tuning, args.known_answer)
    if not args.json:
        print(f"wrote {args.out}: {manifest.variant.name}, {manifest.recipe}")
        print(f"next: python -m serve run {args.out}")
    return {"out": str(args.out), "variant": manifest.variant.name, "recipe": manifest.recipe}


def _run(args: argparse.Namespace) -> None:
    """Run until the server ends or is interrupted; with --json the facts are printed when it is ready."""
    from serve.launch import Ports, Server

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    ports = Ports(args.http_port, args.grpc_port, args.metrics_port, args.host)
    with Server(args.deployment, ports, args.tritonserver) as server:
        facts = {
            "url": server.url,
            "http_port": ports.http,
            "metrics_port": ports.metrics,
            "pid": server.pid,
            "start_seconds": round(server.start_seconds, 2),
            "probe_seconds": round(server.probe_seconds, 2),
        }
        if args.json:
            print(json.dumps(facts), flush=True)
        else:
            print(
                f"ready after {server.start_seconds:.1f} s; the known-answer request took {server.probe_seconds:.2f} s"
            )
            print(
                f"gRPC {server.url}  HTTP {ports.host}:{ports.http}  metrics {ports.host}:{ports.metrics}", flush=True
            )
            print("Ctrl-C ends it", flush=True)
        try:
            code = server.wait()
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr, flush=True)
            return
    raise CheckFailed(f"tritonserver ended with code {code}")


def _generate(args: argparse.Namespace) -> dict[str, Any]:
    from serve.client import Client

    suffix = args.out.suffix.lower().removeprefix(".")
    output_format = {"jpg": "jpeg"}.get(suffix, suffix)
    if output_format not in FORMATS:
        raise UsageError(f"--out {args.out}: the suffix must be one of .png, .jpg, .jpeg, .webp")
    if not args.out.parent.is_dir() or not os.access(args.out.parent, os.W_OK):
        raise UsageError(f"--out {args.out}: cannot write into {args.out.parent}")
    names = ("prompt", "negative_prompt", "seed", "width", "height", "steps", "guidance", "num_images")
    wanted = {name: getattr(args, name) for name in names} | {"output_format": output_format}
    show = sys.stderr.isatty()

    def tick(seconds: float) -> None:
        if show:
            print(f"\rpainting {seconds:5.1f} s", end="", file=sys.stderr, flush=True)

    with Client(args.url) as client:
        try:
            pictures = client.paint(wanted, timeout=args.timeout, tick=tick)
        finally:
            if show:
                print("\r\033[K", end="", file=sys.stderr, flush=True)
    paths = _paths(args.out, len(pictures.images))
    for path, image in zip(paths, pictures.images, strict=True):
        path.write_bytes(image)
    if not args.json:
        print(f"{', '.join(str(p) for p in paths)}  seed {pictures.seed}  {pictures.seconds:.2f} s")
    return {"images": [str(p) for p in paths], "seed": pictures.seed, "seconds": round(pictures.seconds, 3)}


def _paths(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{n}{out.suffix}") for n in range(1, count + 1)]


if __name__ == "__main__":
    sys.exit(main())
