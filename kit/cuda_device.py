"""The GPU, driver and TensorRT of a machine, as far as plans depend on them; looking at it imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass

from kit.gpus import of_device
from kit.hardware import Device, devices
from kit.software import TENSORRT, versions


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

    @classmethod
    def of(cls, device: Device) -> CudaDevice:
        """Keep of a device what does not change from one moment to the next."""
        major, _, minor = device.capability.partition(".")
        capability = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else (0, 0)
        return cls(device.name, capability, device.memory, device.driver)


@dataclass(frozen=True)
class Machine:
    """What engines are built and loaded on; either may be missing."""

    device: CudaDevice | None
    tensorrt: str | None  # a version


def this_machine(index: int = 0) -> Machine:
    """Look at this machine; `index` counts the GPUs as nvidia-smi does."""
    found, _ = devices()
    installed = versions()
    tensorrt = next((installed[name] for name in TENSORRT if name in installed), None)
    return Machine(CudaDevice.of(found[index]) if index < len(found) else None, tensorrt)
