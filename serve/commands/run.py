"""The command `serve run`: run a deployment on tritonserver until it is interrupted."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path

from kit.artifact import read_manifest
from kit.certificate import quality
from kit.errors import CheckFailed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; the default ports are those of Triton."""
    from serve.launch import TcpPorts

    parser.add_argument("deployment", type=Path, metavar="DEPLOY", help="what `serve repository` wrote")
    parser.add_argument("--host", metavar="ADDRESS", default=TcpPorts.host, help="address to listen on")
    for name in ("http", "grpc", "metrics"):
        about = f"port of {name}"
        parser.add_argument(f"--{name}-port", type=int, default=getattr(TcpPorts, name), metavar="PORT", help=about)
    parser.add_argument(
        "--tritonserver",
        type=Path,
        metavar="FILE",
        help="the binary to run; default: the one on PATH, then that of nvidia-pytriton",
    )


def run(args: argparse.Namespace) -> None:
    """Run until the server exits or is interrupted; with --json the facts are printed once it is ready."""
    from serve.launch import Server, TcpPorts

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for sign in (signal.SIGINT, signal.SIGTERM):  # a shell lets what it starts with `&` ignore SIGINT
        signal.signal(sign, interrupt)
    ports = TcpPorts(args.http_port, args.grpc_port, args.metrics_port, args.host)
    with Server(args.deployment, ports, args.tritonserver) as server:
        judged = quality(args.deployment, read_manifest(args.deployment))
        facts = {
            "url": server.url,
            "quality": judged,
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
            print(f"quality: {judged}")
            print("press Ctrl-C to stop", flush=True)
        try:
            code = server.wait()
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr, flush=True)
            return
    raise CheckFailed(f"tritonserver exited with code {code}")
