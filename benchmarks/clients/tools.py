"""Get load generators of others from the package index, each into a folder of its own, never into this environment.

NVIDIA's perf_analyzer is a program in the wheel of tritonclient 2.51.0; later wheels need a newer C library or do not
have it, and the package of that name on the index is empty. It needs two libraries that nvidia-pytriton brings.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from kit.errors import CheckFailed, UsageError

PACKAGES = {"aiperf": "aiperf==0.13.0", "locust": "locust==2.47.0"}
WHEEL = "tritonclient==2.51.0"
PROGRAM = "tritonclient-2.51.0.data/data/bin/perf_analyzer"
LIBRARIES = {
    "libb64": "libb64.so.0d",
    "libcudart": "libcudart.so.12",
}  # how they begin in nvidia-pytriton -> their names


def perf_analyzer(cache: Path) -> Path:
    """Return the program, with its libraries in `lib` beside it; raises CheckFailed if it cannot be had."""
    folder = cache / "perf_analyzer"
    program = folder / "perf_analyzer"
    if not program.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        _pip(["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL], WHEEL)
        (wheel,) = folder.glob("tritonclient-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            program.write_bytes(archive.read(PROGRAM))
        program.chmod(0o755)
        wheel.unlink()
    libraries = folder / "lib"
    libraries.mkdir(exist_ok=True)
    for start, name in LIBRARIES.items():
        link = libraries / name
        link.unlink(missing_ok=True)
        link.symlink_to(_library(start))
    return program


def in_own_environment(name: str, cache: Path) -> Path:
    """Return the program of a Python package in a virtual environment; raises CheckFailed if it cannot be installed."""
    folder = cache / name
    program = folder / "bin" / name
    if not program.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        _pip(["install", PACKAGES[name]], PACKAGES[name], folder / "bin" / "python")
    return program


def _pip(words: list[str], what: str, python: Path = Path(sys.executable)) -> None:
    command = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise CheckFailed(f"{what} cannot be had from the package index: {reason}")


def _library(start: str) -> Path:
    try:
        files = metadata.files("nvidia-pytriton") or []
    except metadata.PackageNotFoundError:
        raise UsageError(
            "perf_analyzer needs libraries of the package nvidia-pytriton: pip install nvidia-pytriton"
        ) from None
    for file in files:
        if file.name.startswith(f"{start}-") and ".so" in file.name:
            return Path(str(file.locate())).resolve()
    raise CheckFailed(f"nvidia-pytriton brings no {start}, which perf_analyzer needs")
