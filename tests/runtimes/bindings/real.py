"""Import NVIDIA's bindings without TensorRT: three stub libraries satisfy the loader, one process per version.

The wheels `tensorrt-cu13-bindings` hold one shared object that asks for libnvinfer, libnvinfer_plugin and
libnvonnxparser. Every class, enum, flag and docstring lies in the shared object itself; of the three it needs the nine
factory functions that `nm -D --undefined-only` lists, which nothing calls as long as nothing is constructed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

VERSIONS = ("10.16.1.11", "11.4.0.106")
RTX = "1.7.1.116"  # TensorRT for RTX, which needs no stubs: its libraries are on the package index
ROOT = Path(__file__).parents[3]
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FACTORIES = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)


def folder(version: str) -> Path:
    """Return where the wheel of a version lies unpacked; `make env` puts it beside the environment's packages."""
    place = Path(sys.prefix) / "tensorrt" / version
    if not (place / "tensorrt_bindings").is_dir():
        raise FileNotFoundError(f"{place}: no TensorRT bindings; `make env` fetches them (needs the package index)")
    return place


def make_stubs(major: str, out: Path) -> None:
    """Compile the three libraries that the bindings of a major version ask for."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise FileNotFoundError("no C compiler: the conformance tests need cc or gcc for nine empty functions")
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in FACTORIES)
    for library in LIBRARIES:
        command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(out / f"lib{library}.so.{major}")]
        subprocess.run(command, input=source, text=True, check=True)


@cache
def interface(version: str) -> dict[str, Any]:
    """Return what `describe.py` says of the bindings of a version."""
    if version == RTX:
        return _described(version, Path(sys.prefix) / "tensorrt" / f"rtx-{version}", "tensorrt-rtx")
    bindings = folder(version)
    with tempfile.TemporaryDirectory() as stubs:
        make_stubs(version.partition(".")[0], Path(stubs))
        return _described(version, bindings, "tensorrt", LD_LIBRARY_PATH=stubs)


def _described(version: str, bindings: Path, compiler: str, **variables: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(bindings), str(ROOT)]), **variables}
    command = [sys.executable, "-W", "ignore", "-m", "tests.runtimes.bindings.describe", compiler]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"the bindings {version} did not import:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["version"] == version, f"asked for {version}, imported {found['version']}"
    return found
