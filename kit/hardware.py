"""The hardware of this machine: CPU and its number formats, memory, disk, GPUs. Reads files and runs nvidia-smi."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from kit.cuda_device import CudaDevice, devices

# CPU instructions that decide which number formats run fast, by their names in /proc/cpuinfo.
CPU_FEATURES = ("avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
SHARED = Path("/dev/shm")
INT8_FEATURES = ("avx_vnni", "avx512_vnni", "amx_int8")


@dataclass(frozen=True)
class Cpu:
    """A CPU: its name, the number of cores available to this process, and which of CPU_FEATURES it has."""

    name: str
    cores: int
    features: tuple[str, ...]

    @property
    def int8(self) -> tuple[str, ...]:
        """The features that multiply 8-bit integers and accumulate in 32 bits."""
        return tuple(feature for feature in INT8_FEATURES if feature in self.features)


@dataclass(frozen=True)
class Hardware:
    """CPU, memory, disk and GPUs of a machine; sizes in bytes."""

    cpu: Cpu
    memory: int
    memory_available: int
    disk_free: int
    gpus: tuple[CudaDevice, ...]
    gpu_problem: str | None  # why no GPU was found; None if one was
    shared_free: int | None = None  # free bytes of /dev/shm; None if there is none


def look(folder: Path, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> Hardware:
    """Inspect the machine; `folder` is where artifacts would be written."""
    memory, available = _memory(proc / "meminfo", groups / "memory.max")
    gpus, problem = devices()
    return Hardware(
        cpu(proc / "cpuinfo"), memory, available, shutil.disk_usage(folder).free, gpus, problem, shared_free()
    )


def shared_free() -> int | None:
    """Return the free bytes of shared memory, None where there is none."""
    return shutil.disk_usage(SHARED).free if SHARED.is_dir() else None


def cpu(info: Path = Path("/proc/cpuinfo")) -> Cpu:
    """Read the CPU from /proc/cpuinfo."""
    lines = info.read_text().splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(fields.get("flags", "").split())
    return Cpu(
        fields.get("model name", "unknown"),
        len(os.sched_getaffinity(0)),
        tuple(feature for feature in CPU_FEATURES if feature in flags),
    )


def _memory(info: Path, limit: Path) -> tuple[int, int]:
    """Return total and available memory, at most the limit of the container."""
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    total, available = (int(fields[key].split()[0]) * 1024 for key in ("MemTotal", "MemAvailable"))
    text = limit.read_text().strip() if limit.is_file() else "max"
    most = int(text) if text.isdigit() else total
    return min(total, most), min(available, most)


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process; the kernel reports bytes on macOS and KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
