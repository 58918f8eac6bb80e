"""The command `serve run`: run a deployment on tritonserver until it is interrupted."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from kit.artifact import read_manifest
from kit.certificate import quality
from kit.errors import CheckFailed, UsageError

TITLES = {"http": "HTTP", "grpc": "gRPC", "metrics": "metrics"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options; the default ports are those of Triton."""
    from serve.tcp_ports import TcpPorts

    parser.add_argument("deployment", type=Path, metavar="DEPLOY", help="what `serve repository` wrote")
    parser.add_argument("--host", metavar="ADDRESS", default=TcpPorts.host, help="address to listen on")
    for name in TITLES:
        about = f"{TITLES[name]} port"
        parser.add_argument(f"--{name}-port", type=int, default=getattr(TcpPorts, name), metavar="PORT", help=about)
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="time given to requests in flight when the server is stopped",
    )
    parser.add_argument(
        "--verify",
        choices=("quick", "full"),
        default="quick",
        help="weights to read before the start: those that changed since they were last verified, or all",
    )
    parser.add_argument(
        "--otlp",
        default="",
        metavar="URL",
        help="OTLP/HTTP collector that receives a trace of each request, such as http://HOST:4318/v1/traces; "
        "default: none",
    )
    parser.add_argument(
        "--tritonserver",
        type=Path,
        metavar="FILE",
        help="the binary to run; default: the one on PATH, then that of nvidia-pytriton",
    )


class Stop:
    """The signals that end the server: the first starts a drain, the second ends it. A start is interrupted at once."""

    def __init__(self) -> None:
        self.asked, self.hurry = threading.Event(), threading.Event()
        self.starting = True
        for sign in (signal.SIGINT, signal.SIGTERM):  # a shell lets what it starts with `&` ignore SIGINT
            signal.signal(sign, self._receive)

    def _receive(self, *_: object) -> None:
        if self.asked.is_set():
            self.hurry.set()
        self.asked.set()
        if self.starting:
            self.starting = False  # the clean-up is not interrupted
            raise KeyboardInterrupt


def run(args: argparse.Namespace) -> None:
    """Run until the server ends for good or is stopped; with --json the facts are printed once it is ready."""
    from serve.launch import Server
    from serve.tcp_ports import TcpPorts

    stop = Stop()
    ports = TcpPorts(args.http_port, args.grpc_port, args.metrics_port, args.host)
    server = Server(
        args.deployment, ports, args.tritonserver, on_event=_tell, verify_weights=args.verify, otlp=_otlp(args.otlp)
    )
    code, failure = None, None
    try:
        server.__enter__()
        stop.starting = False
        if not stop.asked.is_set():
            _announce(args, server, ports)
        while failure is None and not stop.asked.is_set():
            failure = server.wait(0.2)
    finally:
        stop.starting = False
        if failure is None and stop.asked.is_set():
            print("stopping; press Ctrl-C again to drop the requests in flight", file=sys.stderr, flush=True)
        code = server.stop(args.drain_seconds if failure is None else 0, stop.hurry)
    if failure is not None:
        raise CheckFailed(f"the server cannot be kept running: {failure}")
    if code != 0:
        told = "had to be killed" if code is None else f"ended with code {code}"
        raise CheckFailed(f"the server was stopped, but tritonserver {told}; its messages are above")


def _otlp(url: str) -> str:
    """Return the address of a collector; raises UsageError if it is none or if nothing here can export spans."""
    if not url:
        return ""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or len(parts.path) < 2:
        raise UsageError(f"--otlp {url}: give the whole address of the collector, such as http://HOST:4318/v1/traces")
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None:
        raise UsageError('--otlp needs OpenTelemetry: pip install "flux2-deploy[tracing]"')
    return url


def _tell(event: str) -> None:
    print(event, file=sys.stderr, flush=True)


def _announce(args: argparse.Namespace, server: Any, ports: Any) -> None:
    judged = quality(args.deployment, read_manifest(args.deployment))
    checked = server.checked
    if args.json:
        facts = {
            "url": server.url,
            "quality": judged,
            "http_port": ports.http,
            "metrics_port": ports.metrics,
            "pid": server.pid,
            "start_seconds": round(server.start_seconds, 2),
            "probe_seconds": round(server.probe_seconds, 2),
            "verify": args.verify,
            "weights": {
                "files": checked.files,
                "read": checked.read,
                "pending": len(checked.pending),
                "seconds": round(checked.seconds, 2),
            },
        }
        print(json.dumps(facts), flush=True)
        return
    print(f"ready after {server.start_seconds:.1f} s; the known-answer request took {server.probe_seconds:.2f} s")
    print(f"gRPC {server.url}  HTTP {ports.host}:{ports.http}  metrics {ports.host}:{ports.metrics}")
    print(f"quality: {judged}")
    later = f", {len(checked.pending)} are read for the first time in the background" if checked.pending else ""
    print(f"weights: {checked.files} files, {checked.read} read before the start{later}")
    print("press Ctrl-C to stop", flush=True)
