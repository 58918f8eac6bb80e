"""The two TensorRT compilers as data: what each can target and do here, and how its Python bindings are loaded.

TensorRT proper builds on the GPU that the plan is for. TensorRT for RTX builds ahead of time, without a GPU, for the
compute capabilities in its row. Both have the same Python API; modules that use it import it as `tensorrt`, and
`activate` decides which compiler that is for the life of the process.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from kit.errors import UsageError
from kit.gpus import Gpu

CompilerName = Literal["tensorrt", "tensorrt-rtx"]
Capability = tuple[int, int]
# In the plan | in one shared file, put into the plan when it is loaded | in the plan, streamed | inputs of the network
WeightMode = Literal["plan", "refit", "stream", "inputs"]
Hardware = Literal["exact", "same-capability", "ampere-plus"]
Version = Literal["exact", "compatible"]
AUTO = "auto"


@dataclass(frozen=True)
class Compiler:
    """What one compiler is, where it comes from and what it can do."""

    name: CompilerName
    title: str
    module: str  # the Python bindings
    packages: tuple[str, ...]  # distributions that bring bindings, the first installed one has the version
    install: str  # what to tell a user who has none
    oldest: tuple[int, int]  # versions that the kit builds with, the major and minor number
    newest: tuple[int, int]
    targets: tuple[Capability, ...]  # compute capabilities of plans; none: that of this machine's GPU
    weights: tuple[WeightMode, ...]
    hardware: tuple[Hardware, ...]
    versions: tuple[Version, ...]
    levels: bool  # whether the optimization level changes anything
    timing_cache: bool
    table: Literal["inspector", "log"]  # where the table of compiled layers is read
    library_package: str = ""  # the package whose folder holds the shared libraries, loaded before the bindings
    libraries: tuple[str, ...] = ()  # patterns of their file names, in the order of loading

    @property
    def needs_gpu(self) -> bool:
        return not self.targets

    @property
    def supported(self) -> str:
        """The versions that the kit builds with, in words."""
        return f"{'.'.join(map(str, self.oldest))} to {self.newest[0]}.x"

    def supports(self, version: str) -> bool:
        """Return whether the kit builds with a version."""
        return self.oldest <= tuple(int(word) for word in version.split(".")[:2]) <= self.newest

    def can_target(self, gpu: Gpu) -> bool:
        """Return whether plans for a GPU can be built, given that GPU where one is needed."""
        return self.needs_gpu or gpu.compute_capability in self.targets


COMPILERS: Mapping[str, Compiler] = {
    row.name: row
    for row in (
        Compiler(
            name="tensorrt",
            title="TensorRT",
            module="tensorrt",
            packages=("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
            install="pip install tensorrt-cu13",
            oldest=(10, 13),  # the first that takes weights by address
            newest=(11, 99),
            targets=(),
            weights=("plan", "refit", "stream", "inputs"),
            hardware=("exact", "same-capability", "ampere-plus"),
            versions=("exact", "compatible"),
            levels=True,
            timing_cache=True,
            table="inspector",
        ),
        Compiler(
            name="tensorrt-rtx",
            title="TensorRT for RTX",
            module="tensorrt_rtx_bindings",
            packages=("tensorrt-rtx-cu13-bindings",),
            install="pip install 'flux2-deploy[tensorrt-rtx]'",
            oldest=(1, 7),
            newest=(1, 99),
            targets=((8, 0), (8, 6), (8, 9), (12, 0)),
            weights=("plan", "inputs"),  # stripping and refitting ask for a GPU
            hardware=("exact",),
            versions=("exact",),
            levels=False,
            timing_cache=False,
            table="log",
            library_package="onnxruntime_ep_nv_tensorrt_rtx",
            libraries=("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*"),
        ),
    )
}


def compiler(name: str) -> Compiler:
    """Look a compiler up by name; raises UsageError that lists them."""
    if name not in COMPILERS:
        raise UsageError(f"unknown compiler {name!r}; there are: {', '.join((AUTO, *COMPILERS))}")
    return COMPILERS[name]


def choose(name: str, gpu: Gpu, here: str | None) -> Compiler:
    """Return the compiler for a GPU; `here` is the kit's name of this machine's GPU, None without one.

    `auto` is TensorRT where the GPU is, else TensorRT for RTX. Raises UsageError when the compiler cannot build for it.
    """
    if name == AUTO:
        name = "tensorrt" if here == gpu.name or not COMPILERS["tensorrt-rtx"].can_target(gpu) else "tensorrt-rtx"
    found = compiler(name)
    if not found.can_target(gpu):
        known = ", ".join(f"{major}.{minor}" for major, minor in found.targets)
        raise UsageError(
            f"--compiler {found.name} builds for compute capability {known}; {gpu.name} has {gpu.capability}: "
            "use --compiler tensorrt on a machine with that GPU"
        )
    return found


def installed(row: Compiler) -> str | None:
    """Return the installed version of a compiler's bindings, None when they or its libraries are missing."""
    if row.library_package and missing_libraries(row):
        return None
    for package in row.packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None


def missing_libraries(row: Compiler) -> str | None:
    """Say which shared libraries of a compiler are not installed; None when all are or it brings its own."""
    if not row.library_package:
        return None
    folder = _library_folder(row)
    if folder is None:
        return f"the package with its libraries is missing: {row.install}"
    absent = [pattern for pattern in row.libraries if not list(folder.glob(pattern))]
    return f"{folder} has no {', '.join(absent)}: {row.install}" if absent else None


def activate(row: Compiler) -> Any:
    """Load a compiler's bindings, so that `import tensorrt` gives them in this process; returns the module.

    Raises UsageError when they are missing or the other compiler was activated before: both cannot share a process.
    """
    active = sys.modules.get("tensorrt")
    if active is not None and getattr(active, "__name__", "") not in (row.module, f"{row.module}.{row.module}"):
        raise UsageError(f"{row.title} cannot be loaded: this process already runs {active.__name__}; start another")
    if active is not None:
        return active
    if why := missing_libraries(row):
        raise UsageError(f"{row.title} is not installed: {why}")
    for library in _libraries(row):
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # found by their SONAMEs when the bindings load
    try:
        module = importlib.import_module(row.module)
    except ImportError as error:
        raise UsageError(f"{row.title} is not installed ({error}): {row.install}") from None
    sys.modules["tensorrt"] = module
    return module


def _library_folder(row: Compiler) -> Path | None:
    spec = importlib.util.find_spec(row.library_package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _libraries(row: Compiler) -> list[Path]:
    folder = _library_folder(row) if row.library_package else None
    return [] if folder is None else [sorted(folder.glob(pattern))[0] for pattern in row.libraries]
