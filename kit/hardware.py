"""What this machine is made of: CPU and its number formats, memory, disk, GPUs. Reads files, asks nvidia-smi."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from kit.gpus import MIB, Gpu, of_device

# Instructions that decide what a CPU runs well, by the name that Linux gives them.
CPU_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
INT8_FEATURES = ("avx_vnni", "avx512_vnni", "amx_int8")
QUERY = ("name", "memory.total", "memory.free", "compute_cap", "driver_version")


@dataclass(frozen=True)
class Cpu:
    """The CPU: its name, the cores that this process may use, and which of CPU_FEATURES it has."""

    name: str
    cores: int
    features: tuple[str, ...]

    @property
    def int8(self) -> tuple[str, ...]:
        """Those of its features that multiply 8-bit integers and sum in 32 bits."""
        return tuple(feature for feature in INT8_FEATURES if feature in self.features)


@dataclass(frozen=True)
class Device:
    """A GPU as its driver describes it."""

    name: str
    memory: int
    free: int
    capability: str
    driver: str

    @property
    def known(self) -> Gpu | None:
        """Return the kit's entry, if it has one."""
        return of_device(self.name, self.memory)


@dataclass(frozen=True)
class Hardware:
    """Everything together."""

    cpu: Cpu
    memory: int
    memory_available: int
    disk_free: int
    gpus: tuple[Device, ...]
    gpu_problem: str | None  # why no GPU was found, None when one was


def look(folder: Path, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Hardware:
    """Look at the machine; `folder` is where artifacts would be written."""
    memory, available = _memory(proc / "meminfo", groups / "memory.max")
    gpus, problem = devices()
    return Hardware(cpu(proc / "cpuinfo"), memory, available, shutil.disk_usage(folder).free, gpus, problem)


def devices(program: str = "nvidia-smi", timeout: float = 5.0) -> tuple[tuple[Device, ...], str | None]:
    """Ask nvidia-smi for the GPUs; without one, the second value says why."""
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


def _device(line: str) -> Device:
    name, total, free, capability, driver = (field.strip() for field in line.split(","))
    return Device(name, _mebibytes(total), _mebibytes(free), capability, driver)


def _mebibytes(text: str) -> int:
    """Read MiB; cards that share the host's memory say [N/A]."""
    return int(text) * MIB if text.isdigit() else 0


def cpu(info: Path = Path("/proc/cpuinfo")) -> Cpu:
    """Read what the kernel tells of the CPU."""
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    return Cpu(
        fields.get("model name", "unknown"),
        len(os.sched_getaffinity(0)),
        tuple(feature for feature in CPU_FEATURES if feature in flags),
    )


def _memory(info: Path, limit: Path) -> tuple[int, int]:
    """Return total and available memory; a container's limit lowers both."""
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    text = limit.read_text().strip() if limit.is_file() else "max"
    most = int(text) if text.isdigit() else total
    return min(total, most), min(available, most)


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process; the kernel reports bytes on macOS and KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
