"""The container files, without a container engine: what they say agrees with the code.

That is: commands, ports, paths, versions, the time that a stop may take, and the size of shared memory.
"""

from __future__ import annotations

import inspect
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from kit import commands
from kit.variants import VARIANTS
from planner.shared_memory import Traffic, shared_bytes
from serve.launch import Server
from serve.probe import probe
from serve.settings import TritonRelease, Tuning
from serve.tcp_ports import TcpPorts

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "containers"
FILES = ("Dockerfile.cpu", "Dockerfile.gpu")
SERVICES: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PORTS = [TcpPorts.http, TcpPorts.grpc, TcpPorts.metrics]
SIZES = {"gb": 2**30, "mb": 2**20}  # as Docker reads them
SECONDS = {"s": 1, "m": 60}


def instructions(file: str) -> list[tuple[str, str]]:
    """Return the instructions of a Dockerfile and their arguments, continuation lines joined."""
    lines = [line for line in (FOLDER / file).read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined)]


def the(file: str, name: str) -> str:
    (found,) = (rest for word, rest in instructions(file) if word == name)
    return found


def seconds(text: str) -> int:
    return int(text[:-1]) * SECONDS[text[-1]]


def installed(file: str) -> list[str]:
    """Return the words of the command that installs the kit."""
    (line,) = (rest for word, rest in instructions(file) if word == "RUN" and "pip install" in rest)
    return shlex.split(line[line.index("pip install") :])


def options(file: str) -> Any:
    """Parse the command that a container runs with the parser of `serve run`."""
    words: list[str] = yaml.safe_load(the(file, "CMD"))
    assert words[:4] == ["python", "-m", "serve", "run"]
    return commands.parser("serve", words[3:], "python -m serve").parse_args(words[3:])


@pytest.mark.parametrize("file", FILES)
def test_the_command_of_a_container_serves_the_mounted_deployment_on_the_ports_it_exposes(file: str) -> None:
    chosen = options(file)
    assert [chosen.http_port, chosen.grpc_port, chosen.metrics_port] == PORTS
    assert [int(port) for port in the(file, "EXPOSE").split()] == PORTS
    assert chosen.host == "0.0.0.0"  # of the container; compose.yaml publishes it on loopback only
    for service in SERVICES.values():
        (mount,) = service["volumes"]
        assert (Path(mount["target"]), mount["read_only"]) == (chosen.deployment, True)


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_is_published_on_loopback_only_and_runs_without_privileges(name: str) -> None:
    service = SERVICES[name]
    assert service["ports"] == [f"{TcpPorts.host}:{port}:{port}" for port in PORTS]
    file = ROOT / service["build"]["dockerfile"]
    assert (FOLDER / service["build"]["context"]).resolve() == ROOT
    assert the(file.name, "USER") == service["user"] == "1000:1000"
    assert service["cap_drop"] == ["ALL"]
    assert not {"privileged", "network_mode", "pid", "ipc"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_a_stop_leaves_time_for_the_drain_and_for_the_end_of_the_server(name: str) -> None:
    drain = options(Path(SERVICES[name]["build"]["dockerfile"]).name).drain_seconds
    exit_timeout = inspect.signature(Server.__init__).parameters["exit_timeout"].default
    patience = inspect.signature(Server._end).parameters["patience"].default
    assert SERVICES[name]["stop_signal"] == "SIGTERM"
    assert seconds(SERVICES[name]["stop_grace_period"]) >= drain + exit_timeout + 10 + patience


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_take_as_long_to_start_as_serve_run_waits(name: str) -> None:
    start = inspect.signature(Server.__init__).parameters["start_timeout"].default
    answer = inspect.signature(probe).parameters["timeout"].default
    assert seconds(SERVICES[name]["healthcheck"]["start_period"]) >= start + answer


@pytest.mark.parametrize("name", SERVICES)
def test_shared_memory_is_enough_for_the_default_limits_of_every_variant(name: str) -> None:
    size = SERVICES[name]["shm_size"]
    needed = max(shared_bytes(variant, "fp32", Traffic()) for variant in VARIANTS.values())
    assert int(size[:-2]) * SIZES[size[-2:]] > needed


@contextmanager
def answering(status: int) -> Iterator[int]:
    """Serve one request for Triton's readiness; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/v2/health/ready" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer((TcpPorts.host, 0), Handler) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        yield server.server_port
        thread.join()


@pytest.mark.parametrize("name", SERVICES)
def test_the_health_check_fails_unless_triton_is_ready(name: str) -> None:
    kind, program, *rest = SERVICES[name]["healthcheck"]["test"]
    assert (kind, program) == ("CMD", "python")
    assert str(TcpPorts.http) in rest[-1]

    def check(port: int) -> int:
        words = [*rest[:-1], rest[-1].replace(str(TcpPorts.http), str(port))]
        return subprocess.run([sys.executable, *words], capture_output=True, check=False).returncode

    with answering(200) as port:
        assert check(port) == 0
    with answering(400) as port:  # Triton's answer while it is not ready
        assert check(port) == 1
    assert check(port) == 1  # nothing listens there any more


def test_the_pythons_of_the_images_are_supported() -> None:
    (cpu,) = re.findall(r"python:(3\.\d+)-", the("Dockerfile.cpu", "FROM"))
    ((major, minor),) = re.findall(r"version_info\[:2\] == \((\d), (\d+)\)", (FOLDER / "Dockerfile.gpu").read_text())
    lowest, highest = re.findall(r"3\.(\d+)", PROJECT["requires-python"])
    for version in (cpu, f"{major}.{minor}"):
        assert int(lowest) <= int(version.split(".")[1]) < int(highest)
        assert f"Programming Language :: Python :: {version}" in PROJECT["classifiers"]


def test_numpy_2_is_installed_except_with_the_server_from_the_package_index() -> None:
    locked = (ROOT / "requirements.lock").read_text()
    assert "/src[cpu-server]" in installed("Dockerfile.cpu")
    assert "numpy<2" in PROJECT["optional-dependencies"]["cpu-server"]
    words = installed("Dockerfile.gpu")
    assert "/src[serve,tensorrt]" in words
    assert "numpy>=2" in words
    (pattern,) = re.findall(r'grep -v -i "(.+?)" /src/requirements.lock', (FOLDER / "Dockerfile.gpu").read_text())
    assert len(re.findall(pattern, locked, re.IGNORECASE | re.MULTILINE)) == 1


def test_the_gpu_image_is_the_newest_triton_that_deployments_are_written_for() -> None:
    releases: tuple[str, ...] = get_args(TritonRelease)
    assert the("Dockerfile.gpu", "FROM") == f"nvcr.io/nvidia/tritonserver:{releases[-1]}-py3"
    assert Tuning().triton == releases[0]


def test_an_image_gets_every_package_of_the_kit_and_what_its_build_reads() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    read = {PROJECT["readme"], *PROJECT["license-files"], "pyproject.toml", "requirements.lock"}
    assert kept == {package.split(".")[0] for package in packages} | read
