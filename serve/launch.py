"""Run a deployment on tritonserver; nothing is left behind when it stops."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from kit.artifact import verify
from kit.errors import CheckFailed, UsageError
from kit.hardware import shared_free
from planner.shared_memory import Traffic, problem, shared_bytes
from runtimes.trt.record import RECORD, read_record
from serve.client import Client
from serve.find_server import Binary, find_server
from serve.probe import probe
from serve.settings import Settings

logger = logging.getLogger(__name__)
SHM = Path("/dev/shm")


@dataclass(frozen=True)
class TcpPorts:
    """The addresses a server listens on; the default host is loopback."""

    http: int = 8000
    grpc: int = 8001
    metrics: int = 8002
    host: str = "127.0.0.1"

    @classmethod
    def free(cls) -> TcpPorts:
        """Choose three ports that are currently free."""
        sockets = [socket.socket() for _ in range(3)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        numbers = [s.getsockname()[1] for s in sockets]
        for s in sockets:
            s.close()
        return cls(*numbers)

    def check_free(self) -> None:
        """Raise UsageError if one of the ports is in use."""
        for name in ("http", "grpc", "metrics"):
            number = getattr(self, name)
            with socket.socket() as s:
                s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    s.bind((self.host, number))
                except OSError as error:
                    raise UsageError(
                        f"port {number} on {self.host} cannot be used ({error.strerror}); choose another --{name}-port"
                    ) from None


class Server:
    """A running tritonserver; leaving the `with` block stops it and removes its shared memory.

    `log` receives the server's output (None: inherited). Entering waits until the known-answer request succeeds. It
    raises UsageError or ArtifactError before anything is started, and CheckFailed if the server exits or its image is
    wrong.
    """

    def __init__(
        self,
        deployment: Path,
        ports: TcpPorts | None = None,
        tritonserver: Path | None = None,
        log: Path | None = None,
        start_timeout: float = 120.0,
        exit_timeout: int = 10,
    ) -> None:
        self.deployment = deployment.absolute()
        self.ports = ports or TcpPorts.free()
        self.start_seconds = 0.0
        self.probe_seconds = 0.0
        self._tritonserver = tritonserver
        self._log = log
        self._start_timeout = start_timeout
        self._exit_timeout = exit_timeout
        self._shm_prefix = f"flux2_{uuid.uuid4().hex[:12]}_"
        self._process: subprocess.Popen[bytes] | None = None
        self._workspace: tempfile.TemporaryDirectory[str] | None = None

    @property
    def url(self) -> str:
        """The address for gRPC clients."""
        return f"{self.ports.host}:{self.ports.grpc}"

    @property
    def pid(self) -> int:
        return self._running().pid

    def __enter__(self) -> Server:
        verify(self.deployment, kinds=("deployment",))
        if small := memory_problem(self.deployment, shared_free()):
            logger.warning("%s", small)
        self.ports.check_free()
        self._workspace = tempfile.TemporaryDirectory(prefix="flux2-triton-")
        try:
            self._start(find_server(self._tritonserver, Path(self._workspace.name)))
            self._wait_until_it_generates()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self) -> int:
        """Wait for the server to exit; returns its exit code."""
        return self._running().wait()

    def stop(self) -> int | None:
        """Stop the server with SIGINT, then SIGKILL to its process group; returns its exit code."""
        code = None
        if self._process is not None:
            if self._process.poll() is None:
                self._process.send_signal(signal.SIGINT)
            try:
                code = self._process.wait(self._exit_timeout + 10)
            except subprocess.TimeoutExpired:
                code = None
            self._end_group()
            self._process.wait()
        for path in SHM.glob(f"{self._shm_prefix}*") if SHM.is_dir() else ():
            path.unlink(missing_ok=True)
        if self._workspace is not None:
            self._workspace.cleanup()
            self._workspace = None
        return code

    def _end_group(self) -> None:
        """Kill the rest of the server's process group: python stubs outlive a server that crashed."""
        assert self._process is not None
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            try:
                os.killpg(self._process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise UsageError("the server is not running")
        return self._process

    def _start(self, binary: Binary) -> None:
        command = [
            str(binary.path),
            f"--model-repository={self.deployment}",
            *(f"--{p}-address={self.ports.host}" for p in ("http", "grpc", "metrics")),
            *(f"--{p}-port={getattr(self.ports, p)}" for p in ("http", "grpc", "metrics")),
            f"--exit-timeout-secs={self._exit_timeout}",
            "--disable-auto-complete-config",
            "--log-info=false",
            f"--backend-config=python,shm-region-prefix-name={self._shm_prefix}",
            "--backend-config=python,stub-timeout-seconds=600",
            *tensorrt_options(self.deployment),
            *binary.arguments,
        ]
        environment = {**os.environ, **binary.environment, "HF_HUB_OFFLINE": "1"}
        environment["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), environment.get("PATH", "")])
        output: IO[bytes] | None = self._log.open("wb") if self._log is not None else None
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        finally:
            if output is not None:
                output.close()

    def _wait_until_it_generates(self) -> None:
        start = time.monotonic()
        process = self._running()
        with Client(self.url) as client:
            while not client.ready():
                if process.poll() is not None:
                    raise CheckFailed(f"tritonserver exited with code {process.returncode}{self._log_tail()}")
                if time.monotonic() - start > self._start_timeout:
                    raise CheckFailed(f"tritonserver was not ready after {self._start_timeout:g} s{self._log_tail()}")
                time.sleep(0.05)
            self.probe_seconds = probe(client, self.deployment)
        self.start_seconds = time.monotonic() - start

    def _log_tail(self, lines: int = 15) -> str:
        """Return the last lines of the log, to append to a message."""
        if self._log is None:
            return ""
        text = self._log.read_text(errors="replace").splitlines()
        return "\n".join([f"; the end of {self._log}:", *text[-lines:]])


def memory_problem(deployment: Path, free: int | None) -> str | None:
    """Return why shared memory is too small for requests at the limits of a deployment; None if it is enough."""
    settings = Settings.read(deployment / "tokenizer" / "1")
    limits, tuning = settings.limits, settings.tuning
    native = {part for part, model in settings.tensorrt.items() if model.backend == "tensorrt_plan"}
    traffic = Traffic(tuning.live_requests, tuning.text_batch, tuning.vae_batch, limits.max_images, limits.max_pixels)
    needed = shared_bytes(
        settings.variant, settings.compute, traffic, "text_encoder" not in native, "vae_decoder" not in native
    )
    return problem(free, needed)


def tensorrt_options(deployment: Path) -> list[str]:
    """Return the options that Triton's TensorRT backend needs for a deployment's plans."""
    path = deployment / "denoiser" / "1" / RECORD
    if path.is_file() and read_record(path).version == "compatible":
        return ["--backend-config=tensorrt,version-compatible=true"]
    return []


def _end_with_parent() -> None:
    """Ask Linux to interrupt this process when its parent dies, so that a killed launcher leaves no server running."""
    if sys.platform == "linux":
        set_pdeathsig = 1
        ctypes.CDLL(None).prctl(set_pdeathsig, signal.SIGINT)
