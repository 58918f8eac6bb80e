"""Run a deployment on tritonserver, supervised; nothing is left behind when it stops or is killed."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO

from kit.artifact import verify
from kit.errors import CheckFailed, ServerError, UnavailableError, UsageError
from kit.hardware import shared_free
from serve import contents, janitor, tracing
from serve.client import Client
from serve.find_server import Binary, find_server
from serve.ledger import VARIABLE, Ledger, State
from serve.preflight import memory_problem, triton_options
from serve.probe import probe
from serve.processes import end_group, end_with_parent
from serve.supervise import Supervisor
from serve.tcp_ports import TcpPorts
from serve.wire import FRONT, STREAM

logger = logging.getLogger(__name__)
OWED_SECONDS = 4.0  # after which a server is killed that waits for answers of a process that has died
PLAIN = re.compile(r"[\w./-]+", re.ASCII)  # paths that Triton's python backend can start a process with


class Server:
    """A supervised tritonserver; leaving the `with` block stops it and removes all that it made.

    `log` receives the server's output (None: inherited). Entering waits until the known-answer request succeeds. It
    raises UsageError or ArtifactError before anything is started, and CheckFailed if the server exits or its image is
    wrong. While it runs, processes that die are restarted (see serve.supervise); `on_event` is told. `otlp` is the
    address of an OpenTelemetry collector that gets a trace of each request; "": none.
    """

    def __init__(
        self,
        deployment: Path,
        ports: TcpPorts | None = None,
        tritonserver: Path | None = None,
        log: Path | None = None,
        start_timeout: float = 120.0,
        exit_timeout: int = 10,
        on_event: Callable[[str], None] = lambda event: logger.warning("%s", event),
        verify_weights: contents.Verify = "quick",
        otlp: str = "",
    ) -> None:
        self.deployment = deployment.absolute()
        self.ports = ports or TcpPorts.free()
        self.python_models = sorted(path.parts[-3] for path in self.deployment.glob("*/1/model.py"))
        self.start_seconds = 0.0
        self.probe_seconds = 0.0
        self._tritonserver = tritonserver
        self._log = log
        self._start_timeout = start_timeout
        self._exit_timeout = exit_timeout
        self._on_event = on_event
        self._verify_weights = verify_weights
        self._otlp = otlp
        self._reader: contents.Reader | None = None
        self._shm_prefix = f"flux2_{uuid.uuid4().hex[:12]}_"
        self._secret = uuid.uuid4().hex
        self._process: subprocess.Popen[bytes] | None = None
        self._janitor: subprocess.Popen[str] | None = None
        self._workspace: tempfile.TemporaryDirectory[str] | None = None
        self._supervisor: Supervisor | None = None
        self._binary: Binary | None = None
        self._stopping = False
        self._owes = False  # whether a process of this server died with requests, for which Triton waits when it stops

    @property
    def url(self) -> str:
        """The address for gRPC clients."""
        return f"{self.ports.host}:{self.ports.grpc}"

    @property
    def pid(self) -> int:
        return self._running().pid

    def __enter__(self) -> Server:
        manifest = verify(self.deployment, kinds=("deployment",))
        self.checked = contents.check(self.deployment, manifest, self._verify_weights)
        if small := memory_problem(self.deployment, shared_free()):
            logger.warning("%s", small)
        self.ports.check_free()
        try:
            self._make_workspace()
            self._start()
            self._wait_until_it_generates()
            self._supervisor = Supervisor(self, self._on_event)
            self._reader = contents.Reader(self.deployment, self.checked.pending)
        except BaseException:
            self.stop(drain=0)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self, timeout: float | None = None) -> Exception | None:
        """Wait until the server has ended for good, or for some seconds; returns why it ended, None if it has not."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._supervisor is not None:
            if self._supervisor.failed is not None:
                return self._supervisor.failed
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.05)
        return None

    def exit_code(self) -> int | None:
        """Return the exit code of a tritonserver that has ended, None while it runs."""
        return self._running().poll()

    def stop(self, drain: float = 30.0, hurry: threading.Event | None = None) -> int | None:
        """Finish the requests in flight for at most `drain` seconds, end the server, and remove what it made.

        A second thread may set `hurry` to skip the rest of the wait. Returns the server's exit code, None if it had to
        be killed.
        """
        code = None
        self._stopping = True
        if self._reader is not None:
            self._reader.stop()
        if self._supervisor is not None:
            self._supervisor.release()
        if self._process is not None:
            if self._process.poll() is None and self._supervisor is not None and drain > 0:
                self._drain(drain, hurry)
            code = self._end()
        if self._supervisor is not None:
            self._supervisor.finish()
            self._supervisor = None
        if self._janitor is not None:
            assert self._janitor.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._janitor.stdin.write("done\n")
                self._janitor.stdin.close()
            self._janitor.wait()
            self._janitor = None
        if self._workspace is not None:
            self._workspace.cleanup()
            self._workspace = None
        return code

    def interrupt(self) -> None:
        """Kill tritonserver, so that whoever waits for it stops waiting."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def restart(self) -> None:
        """Kill what is left of a server and start it again; raises CheckFailed if it does not serve."""
        end_group(self.pid, 0)  # it could end by itself only when requests end that nobody works on
        self._running().wait()
        janitor.remove_shared_memory(self._shm_prefix)
        self.ledger.clear()
        self._start()
        self._wait_until_it_generates()

    def reload(self, model: str) -> None:
        """Unload and load a model; raises ServerError if Triton refuses."""
        self._owes = True
        with Client(self.url) as client:
            client.control("unload", model, self._secret)
            client.control("load", model, self._secret)

    def wait_until_ready(self, seconds: float = 600.0) -> None:
        """Wait until Triton says that it serves; raises CheckFailed."""
        deadline = time.monotonic() + seconds
        with Client(self.url) as client:
            while not client.ready():
                if time.monotonic() > deadline or self.exit_code() is not None or self._stopping:
                    raise CheckFailed("tritonserver is not ready")
                time.sleep(0.02)

    def probe_again(self) -> None:
        """Request the known answer; raises a Flux2Error if it is wrong or late. A busy server passes."""
        with Client(self.url) as client, contextlib.suppress(UnavailableError):
            probe(client, self.deployment, max(10.0, 10 * self.probe_seconds))

    def _drain(self, seconds: float, hurry: threading.Event | None) -> None:
        """Let health say "not ready" and requests in flight end."""
        self.ledger.state = State.DRAINING
        threads = [
            threading.Thread(target=self._unload, args=(model,), daemon=True)
            for model in (STREAM, FRONT)
            if self.ledger.occupied  # an idle server can end at once
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        while self.ledger.occupied and time.monotonic() < deadline and self.exit_code() is None:
            if hurry is not None and hurry.wait(0.05):
                break
            time.sleep(0.02)
        if self.ledger.occupied == 0 and threads:
            time.sleep(0.2)  # the last responses leave

    def _unload(self, model: str) -> None:
        with contextlib.suppress(ServerError), Client(self.url) as client:
            client.control("unload", model, self._secret)

    def _end(self, patience: float = 3.0) -> int | None:
        """Interrupt the server, then kill its process group; returns its exit code."""
        code = None
        process = self._running()
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        try:
            code = process.wait(OWED_SECONDS if self._owes else self._exit_timeout + 10)
        except subprocess.TimeoutExpired:
            if self._owes:
                code = 0  # everything else has stopped
            else:
                logger.warning("tritonserver did not stop within %d s and is killed", self._exit_timeout + 10)
        end_group(process.pid, patience)
        process.wait()
        janitor.remove_shared_memory(self._shm_prefix)
        return code

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise UsageError("the server is not running")
        return self._process

    def _make_workspace(self) -> None:
        """Make the folder of this run, with a plain path to the deployment, and start the janitor."""
        parent = tempfile.gettempdir()
        self._workspace = tempfile.TemporaryDirectory(
            prefix="flux2-triton-", dir=parent if PLAIN.fullmatch(parent) else "/tmp"
        )
        folder = Path(self._workspace.name)
        self._binary = find_server(self._tritonserver, folder)
        (folder / "models").symlink_to(self.deployment)
        self.ledger = Ledger(folder / "ledger")
        self._janitor = subprocess.Popen(
            [sys.executable, "-I", "-S", janitor.__file__],
            stdin=subprocess.PIPE,
            text=True,
            cwd="/",
            start_new_session=True,
        )
        self._tell_janitor(f"folder {folder}", f"prefix {self._shm_prefix}", f"patience {self._exit_timeout + 10}")

    def _tell_janitor(self, *lines: str) -> None:
        assert self._janitor is not None
        assert self._janitor.stdin is not None
        self._janitor.stdin.write("".join(f"{line}\n" for line in lines))
        self._janitor.stdin.flush()

    def _start(self) -> None:
        assert self._binary is not None
        assert self._workspace is not None
        binary, models = self._binary, Path(self._workspace.name) / "models"
        options = triton_options(
            self.deployment, self.ports, self._secret, self._exit_timeout, self._shm_prefix, self._otlp
        )
        command = [str(binary.path), f"--model-repository={models}", *options, *binary.arguments]
        environment = {**os.environ, **binary.environment, "HF_HUB_OFFLINE": "1", VARIABLE: str(self.ledger.path)}
        environment[tracing.VARIABLE] = self._otlp
        environment["PATH"] = os.pathsep.join([str(Path(sys.prefix) / "bin"), environment.get("PATH", "")])
        output: IO[bytes] | None = self._log.open("ab" if self._process else "wb") if self._log is not None else None
        try:
            self._process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        finally:
            if output is not None:
                output.close()
        self._owes = False
        self._tell_janitor(f"group {self._process.pid}")

    def _wait_until_it_generates(self) -> None:
        start = time.monotonic()
        process = self._running()
        with Client(self.url) as client:
            while not client.ready():
                if process.poll() is not None:
                    raise CheckFailed(f"tritonserver exited with code {process.returncode}{self._log_tail()}")
                if time.monotonic() - start > self._start_timeout:
                    raise CheckFailed(f"tritonserver was not ready after {self._start_timeout:g} s{self._log_tail()}")
                if self._stopping:
                    raise CheckFailed("the server is stopping")
                time.sleep(0.02)
            self.probe_seconds = probe(client, self.deployment)
        self.start_seconds = time.monotonic() - start

    def _log_tail(self, lines: int = 15) -> str:
        """Return the last lines of the log, to append to a message."""
        if self._log is None:
            return ""
        text = self._log.read_text(errors="replace").splitlines()
        return "\n".join([f"; the end of {self._log}:", *text[-lines:]])
