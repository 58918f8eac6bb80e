"""Which GPU, driver and TensorRT this machine has, asked of nvidia-smi and package metadata: quick, without imports."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata

from kit.gpus import MIB, of_device

# wheels, newest CUDA last; an NGC container has `tensorrt`
TENSORRT_PACKAGES = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-lean", "tensorrt-dispatch")
QUERY = ("name", "compute_cap", "memory.total", "driver_version")


@dataclass(frozen=True)
class CudaDevice:
    """One GPU as the driver describes it."""

    title: str  # NVIDIA H100 80GB HBM3
    compute_capability: tuple[int, int]
    memory_bytes: int
    driver: str

    @property
    def name(self) -> str | None:
        """The kit's name of it (h100), None for a GPU that `kit.gpus` does not list."""
        known = of_device(self.title, self.memory_bytes)
        return known.name if known else None


@dataclass(frozen=True)
class Machine:
    """What engines are built and loaded on; either may be missing."""

    device: CudaDevice | None
    tensorrt: str | None  # a version


def this_machine(index: int = 0) -> Machine:
    """Ask this machine; `index` counts the GPUs as nvidia-smi does."""
    devices = cuda_devices()
    return Machine(devices[index] if index < len(devices) else None, tensorrt_version())


def cuda_devices() -> list[CudaDevice]:
    """List the GPUs of this machine, none where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return (
        [found for line in done.stdout.splitlines() if (found := parse(line)) is not None]
        if not done.returncode
        else []
    )


def parse(line: str) -> CudaDevice | None:
    """Read one line of nvidia-smi: "NVIDIA L4, 8.9, 23034, 580.65.06"; None for a line of another form."""
    fields = [field.strip() for field in line.split(",")]
    if len(fields) != len(QUERY):
        return None
    major, dot, minor = fields[1].partition(".")
    if not (dot and major.isdigit() and minor.isdigit() and fields[2].isdigit()):
        return None
    return CudaDevice(fields[0], (int(major), int(minor)), int(fields[2]) * MIB, fields[3])


def tensorrt_version() -> str | None:
    """Return the version of the installed TensorRT; None when there is none."""
    for package in TENSORRT_PACKAGES:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return None
