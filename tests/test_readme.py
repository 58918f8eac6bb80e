"""README's commands run as written, in order, in an empty folder."""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.images import decode
from quantize.gate.side_by_side import compare, table
from serve.tcp_ports import TcpPorts
from tests.runtimes.rtx import FOLDER, REASON, is_installed

README = Path(__file__).parent.parent / "README.md"
SAVED = README.parent / "benchmarks" / "results" / "gate_sample_int8.json"
MAKE = {"make demo", "make test"}  # make test is this very run; make demo's program has a test of its own


def commands() -> list[str]:
    """Return the lines of README's bash blocks without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL)
    return [
        shlex.join(shlex.split(line, comments=True)) for block in blocks for line in block.splitlines() if line.strip()
    ]


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        shlex.split(command), cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.server
def test_the_commands_of_the_readme_generate_an_image(tmp_path: Path) -> None:
    ports = TcpPorts.free()
    server: subprocess.Popen[str] | None = None
    done, engines = [], []
    try:
        for command in commands():
            if command in MAKE or command.startswith(". "):
                continue
            if "export engine" in command:
                engines.append(command)
                if not is_installed():
                    continue
            if "serve run" in command:
                options = [f"--{name}-port={getattr(ports, name)}" for name in ("http", "grpc", "metrics")]
                argv = [sys.executable, *shlex.split(command)[1:], *options]
                server = subprocess.Popen(
                    argv, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
                )
                assert server.stdout is not None
                assert "ready after" in server.stdout.readline()
            else:
                command = command.replace("127.0.0.1:8000", f"127.0.0.1:{ports.http}")
                if "serve generate" in command:
                    command += f" --url 127.0.0.1:{ports.grpc}"
                result = run(command, tmp_path)
                assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
                if command in engines:
                    assert "24 of 24 quantized products in " in result.stdout
            done.append("curl" if command.startswith("curl") else command.split()[3])
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=30)
    quantized = ["calibrate", "apply", "report", "gate"]
    http = ["curl", "curl", "base64,"]
    built = ["onnx", "apply", "apply", *(["engine", "engine"] if is_installed() else [])]
    assert done == ["onnx", "repository", "run", "generate", *http, "lint", *quantized, *built, "doctor", "plan"]
    gated, saved = (json.loads(file.read_text()) for file in (tmp_path / "build" / "gate" / "report.json", SAVED))
    assert gated["prompts"] == saved["prompts"]
    assert compare(saved, gated).kept, table(compare(saved, gated))
    for name in ("mine.png", "http.png"):
        assert decode((tmp_path / name).read_bytes()).ndim == 3
    (image,) = (o["data"] for o in json.loads((tmp_path / "long.json").read_text())["outputs"] if o["name"] == "image")
    assert decode(base64.b64decode(image[0], validate=True)).ndim == 3
    assert [re.findall(r"build/sample-(?:fp8|int8) --gpu \w+", command) for command in engines] == [
        ["build/sample-fp8 --gpu l4"],
        ["build/sample-int8 --gpu a10g"],
    ]
    if not is_installed():
        pytest.skip(f"every command ran except {' and '.join(engines)}: {REASON}")


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (README.parent / "Makefile").read_text()
    assert set(commands()) >= MAKE
    for command in MAKE:
        assert f"\n{command.split()[1]}:" in makefile


@pytest.mark.server
def test_the_demo_generates_and_is_quick_the_second_time(tmp_path: Path) -> None:
    command = f"python -m benchmarks.demo --build {tmp_path / 'build'} --out {tmp_path / 'demo.png'} --json"
    exports = []
    for _ in range(2):
        result = run(command, README.parent)
        assert result.returncode == 0, result.stderr
        exports.append(json.loads(result.stdout.splitlines()[-1])["seconds"]["export"])
    assert exports[1] < exports[0] / 3, exports
    assert decode((tmp_path / "demo.png").read_bytes()).ndim == 3
