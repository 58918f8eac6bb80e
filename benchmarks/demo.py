"""Generate an image with the sample on a real Triton server and print the time of each stage (`make demo`)."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.artifact import verify
from kit.checkpoint import resolve
from kit.cli import report
from kit.commands import Help, Parser
from kit.outputs import check_out_file

PROMPT = "a red circle left of a blue square on a white background"


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.demo", description=__doc__, formatter_class=Help)
    parser.add_argument("--build", type=Path, default=Path("build"), metavar="DIR", help="folder for artifacts")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), metavar="FILE", help="the image to write")
    parser.add_argument("--prompt", default=PROMPT, metavar="TEXT", help="what to generate")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="0 to 2^63-1")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line of stdout")
    argv = sys.argv[1:] if argv is None else argv

    def step() -> dict[str, Any]:
        args = parser.parse_args(argv)
        check_out_file(args.out)
        return run(args.build, args.out, args.prompt, args.seed, quiet=args.json)

    return report(step, "--json" in argv)


def run(build: Path, out: Path, prompt: str, seed: int, quiet: bool = False) -> dict[str, Any]:
    """Export, write the deployment, serve it on loopback, generate and save one image; returns seconds by stage."""
    from export.artifact import ExportConfig, export  # imports torch and diffusers
    from pipeline.request import Limits
    from serve.client import Client
    from serve.launch import Server
    from serve.repository import is_current, write_repository
    from serve.settings import Tuning

    table: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[list[str]]:
        notes: list[str] = []
        begin = time.perf_counter()
        if not quiet and sys.stdout.isatty():
            print(f"{name} ...", end="", flush=True)
        yield notes
        table[name] = round(time.perf_counter() - begin, 2)
        if not quiet:
            start = "\r\033[K" if sys.stdout.isatty() else ""
            print(f"{start}{name:<12} {table[name]:6.2f} s  {' '.join(notes)}".rstrip(), flush=True)

    artifact, deployment = build / "sample", build / "sample-deploy"
    with stage("checkpoint") as notes:
        checkpoint = resolve("sample")
        notes.append(f"sample: {checkpoint.name}")
    with stage("export") as notes:
        exported = export(checkpoint, artifact, ExportConfig())
        notes.append(f"{artifact}{' is up to date' if exported.up_to_date else ''}")
    with stage("repository") as notes:
        if is_current(deployment, artifact, Limits(), Tuning()):
            notes.append(f"{deployment} is up to date")
        else:
            write_repository(artifact, deployment, Limits(), Tuning())
            notes.append(str(deployment))
    server = Server(deployment, log=build / "triton.log")
    with stage("start server") as notes:
        server.__enter__()
        notes.append(f"Triton on {server.url}; it reproduced the known image")
    try:
        with stage("one request") as notes, Client(server.url) as client:
            images = client.generate({"prompt": prompt, "seed": seed}, timeout=120)
            out.write_bytes(images.images[0])
            notes.append(f"{out}: {prompt!r}, seed {images.seed}")
    finally:
        with stage("stop server"):
            server.stop()
    if not quiet:
        print_next(deployment, out)
    return {"image": str(out), "seed": images.seed, "variant": verify(deployment).variant.name, "seconds": table}


def print_next(deployment: Path, out: Path) -> None:
    """Print suggested next commands."""
    print(f"\n{out} was generated. To run a server and send requests yourself:")
    print(f"  .venv/bin/python -m serve run {shlex.quote(str(deployment))}")
    print(f'  .venv/bin/python -m serve generate "{PROMPT}" --out mine.png --seed 2')
    print("With your own checkpoint:")
    print("  .venv/bin/python -m export onnx FOLDER --out build/mine")
    print("  .venv/bin/python -m serve repository build/mine --out build/mine-deploy")


if __name__ == "__main__":
    sys.exit(main())
