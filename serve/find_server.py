"""Find a tritonserver and what it needs to start.

Without a GPU or a container, the binary in the PyPI package nvidia-pytriton is used (Triton 24.10 with the python
backend). Its python stub must match this interpreter's minor version, finds its packages only through the `python3` on
PATH, and passes empty arrays with numpy 2 or newer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kit.errors import UsageError


@dataclass(frozen=True)
class Binary:
    """A tritonserver and what it needs to start."""

    path: Path
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def find_server(explicit: Path | None, workspace: Path) -> Binary:
    """Find tritonserver: the explicit path, then PATH, then nvidia-pytriton, whose files are linked in `workspace`.

    Raises UsageError that lists where it was searched and how to get one.
    """
    if explicit is not None:
        if not os.access(explicit, os.X_OK) or explicit.is_dir():
            raise UsageError(f"--tritonserver {explicit}: not an executable file")
        return Binary(explicit.absolute())
    on_path = shutil.which("tritonserver")
    if on_path:
        return Binary(Path(on_path))
    spec = importlib.util.find_spec("pytriton")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(
            "no tritonserver found: not on PATH, and the package nvidia-pytriton is not installed; install it, run "
            "inside the tritonserver container, or pass one with --tritonserver"
        )
    return _pytriton(Path(spec.submodule_search_locations[0]), workspace)


def _pytriton(package: Path, workspace: Path) -> Binary:
    numpy = importlib.metadata.version("numpy")
    if int(numpy.split(".")[0]) >= 2:
        raise UsageError(f"numpy {numpy} is installed; the server of nvidia-pytriton returns empty arrays with 2.x")
    bundle = package / "tritonserver"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = bundle / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        found = ", ".join(sorted(p.name for p in (bundle / "python_backend_stubs").iterdir()))
        raise UsageError(f"nvidia-pytriton has no python backend for Python {version}; it has: {found}")
    backend = workspace / "backends" / "python"
    backend.mkdir(parents=True)
    for source in (*(bundle / "backends" / "python").iterdir(), stub):
        if source.is_file():
            (backend / source.name).symlink_to(source)
    libraries = [str(package.parent / "nvidia_pytriton.libs"), str(sysconfig.get_config_var("LIBDIR"))]
    return Binary(
        bundle / "bin" / "tritonserver",
        arguments=(f"--backend-directory={workspace / 'backends'}", f"--cache-directory={bundle / 'caches'}"),
        environment={"LD_LIBRARY_PATH": os.pathsep.join(libraries)},
    )
