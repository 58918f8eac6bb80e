"""GPUs, driver and TensorRT of this machine, from nvidia-smi and package metadata; imports nothing heavy."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, field

from kit.compilers import COMPILERS
from kit.compilers import installed as installed_version
from kit.gpus import MIB, Gpu, of_device
from kit.software import TENSORRT, versions

QUERY = ("name", "memory.total", "memory.free", "compute_cap", "driver_version")


@dataclass(frozen=True)
class CudaDevice:
    """A GPU as its driver describes it."""

    title: str  # for example NVIDIA H100 80GB HBM3
    compute_capability: tuple[int, int]  # (0, 0) if the driver does not report it
    memory_bytes: int
    driver: str
    free_bytes: int = field(default=0, compare=False)  # when it was queried

    @property
    def known(self) -> Gpu | None:
        """The kit's entry for this GPU; None if `kit.gpus` does not list it."""
        return of_device(self.title, self.memory_bytes)

    @property
    def name(self) -> str | None:
        """The kit's name for this GPU, for example h100; None if `kit.gpus` does not list it."""
        return self.known.name if self.known else None

    @property
    def capability(self) -> str:
        """The compute capability as NVIDIA writes it, for example 8.9."""
        return ".".join(map(str, self.compute_capability))


@dataclass(frozen=True)
class Machine:
    """The GPU and the versions of TensorRT that engines are built and loaded with; each may be missing."""

    device: CudaDevice | None
    tensorrt: str | None
    rtx: str | None = None  # TensorRT for RTX

    @property
    def device_name(self) -> str | None:
        """The kit's name of the GPU, None without one that it lists."""
        return self.device.name if self.device else None


def this_machine(index: int = 0) -> Machine:
    """Inspect this machine; `index` counts the GPUs as nvidia-smi does."""
    found, _ = devices()
    installed = versions()
    tensorrt = next((installed[name] for name in TENSORRT if name in installed), None)
    return Machine(found[index] if index < len(found) else None, tensorrt, installed_version(COMPILERS["tensorrt-rtx"]))


def devices(program: str = "nvidia-smi", timeout: float = 5.0) -> tuple[tuple[CudaDevice, ...], str | None]:
    """List the GPUs that nvidia-smi reports; if there are none, the second value says why."""
    if shutil.which(program) is None:
        return (), "no nvidia-smi, so no NVIDIA driver is installed here"
    command = [program, f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return (), f"nvidia-smi did not answer within {timeout:g} s"
    if done.returncode:
        words = (done.stdout + done.stderr).strip().splitlines()
        return (), f"nvidia-smi failed: {words[-1] if words else f'exit code {done.returncode}'}"
    found = tuple(_device(line) for line in done.stdout.splitlines() if line.count(",") == len(QUERY) - 1)
    return found, None if found else "nvidia-smi lists no GPU"


def _device(line: str) -> CudaDevice:
    title, total, free, capability, driver = (entry.strip() for entry in line.split(","))
    major, _, minor = capability.partition(".")
    numbers = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
    return CudaDevice(title, numbers, _mebibytes(total), driver, _mebibytes(free))


def _mebibytes(text: str) -> int:
    """Convert MiB to bytes; GPUs that share the host's memory report [N/A]."""
    return int(text) * MIB if text.isdigit() else 0
