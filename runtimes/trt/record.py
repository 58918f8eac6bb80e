"""How and where an engine was built, as recorded in its manifest, and whether it loads on a machine.

A plan contains kernels that one version of TensorRT compiled and timed on one GPU. On another it fails late or runs
slowly, so a mismatch is reported before loading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kit.artifact import Manifest
from kit.compilers import COMPILERS, CompilerName, Hardware, Version, WeightMode
from kit.cuda_device import CudaDevice, Machine
from kit.errors import ArtifactError
from kit.ports import PartName
from runtimes.trt.profiles import AxisRange, Profile

RECORD = "engine.json"  # the record's file name next to plans without a manifest
KERNELS = ".kernels"  # files beside plans that TensorRT for RTX fills while it runs; they are no part of an artifact


@dataclass(frozen=True)
class PlanRecord:
    """One plan of a part: its file in the artifact, its profiles, and the precisions of its layers."""

    file: str
    profiles: tuple[Profile, ...]
    bytes: int
    layers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineRecord:
    """The options of an engine artifact's manifest."""

    gpu: str  # the kit's name of the GPU
    device: CudaDevice
    tensorrt: str
    weights: WeightMode
    hardware: Hardware
    version: Version
    build: Mapping[str, Any]  # other options: optimization level, workspace, ...
    plans: Mapping[PartName, tuple[PlanRecord, ...]]
    compiler: CompilerName = "tensorrt"

    def options(self) -> dict[str, Any]:
        """Return the record as the options of a manifest; how much memory was free is left out."""
        options = asdict(self)
        del options["device"]["free_bytes"]
        return options

    @classmethod
    def of(cls, manifest: Manifest) -> EngineRecord:
        """Read the record of an engine artifact; raises ArtifactError if it is invalid."""
        return cls.read(manifest.options)

    @classmethod
    def read(cls, options: Mapping[str, Any]) -> EngineRecord:
        """Rebuild a record from its options, before or after JSON."""
        try:
            raw = dict(options)
            device = dict(raw.pop("device"))
            capability = tuple(device.pop("compute_capability"))
            plans = {
                part: tuple(
                    PlanRecord(**{**plan, "profiles": tuple(_profile(p) for p in plan["profiles"])}) for plan in made
                )
                for part, made in raw.pop("plans").items()
            }
            return cls(device=CudaDevice(**device, compute_capability=capability), plans=plans, **raw)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"the manifest of an engine is invalid ({error!r}); build it again") from None

    def plans_of(self, part: PartName) -> tuple[PlanRecord, ...]:
        if part not in self.plans:
            raise ArtifactError(f"the engine has no {part}; it has: {', '.join(self.plans) or 'no parts'}")
        return self.plans[part]


def _profile(raw: Mapping[str, Any]) -> Profile:
    return Profile(raw["name"], {axis: AxisRange(**bounds) for axis, bounds in raw["axes"].items()})


def mismatch(record: EngineRecord, machine: Machine) -> str | None:
    """Return why an engine does not load on a machine and what to do, in one sentence; None if it does."""
    if record.compiler == "tensorrt-rtx":
        return _wrong_capability(record, machine.device) or _wrong_rtx(record, machine.rtx)
    return _wrong_gpu(record, machine.device) or _wrong_tensorrt(record, machine.tensorrt)


def _wrong_capability(record: EngineRecord, device: CudaDevice | None) -> str | None:
    """A plan of TensorRT for RTX is for a compute capability, whichever GPU has it."""
    built = f"the engine was built for {record.gpu} (compute capability {record.device.capability})"
    if device is None:
        return f"{built}, but nvidia-smi lists no GPU on this machine"
    if device.compute_capability != record.device.compute_capability:
        here = device.name or "the GPU of this machine"
        return f"{built}, this machine has {device.title} ({device.capability}): build it with --gpu {here}"
    return None


def _wrong_rtx(record: EngineRecord, version: str | None) -> str | None:
    """Engines are not compatible between releases, neither older nor newer; the fourth number is a build of one."""
    row = COMPILERS["tensorrt-rtx"]
    built = f"the engine was built with {row.title} {record.tensorrt}"
    if version is None:
        return f"{built}, this machine has none: {row.install}"
    if _numbers(version)[:3] != _numbers(record.tensorrt)[:3]:
        return (
            f"{built}, this machine has {version}: pip install {row.packages[0]}=={record.tensorrt} and the package of "
            "its libraries, or build it again with this version"
        )
    return None


def _wrong_gpu(record: EngineRecord, device: CudaDevice | None) -> str | None:
    built = f"the engine was built on {record.device.title} (compute capability {record.device.capability})"
    if device is None:
        return f"{built}, but nvidia-smi lists no GPU on this machine"
    here = f"this machine has {device.title} ({device.capability})"
    wider: str | None
    match record.hardware:
        case "exact":
            fits, wider = device.title == record.device.title, "--hardware same-capability or ampere-plus"
        case "same-capability":
            fits, wider = device.compute_capability == record.device.compute_capability, "--hardware ampere-plus"
        case "ampere-plus":
            fits, wider = device.compute_capability >= (8, 0), None
    if not fits:
        again = f"build it again here, or there with {wider}" if wider else "it needs Ampere or newer"
        return f"{built}, {here}: {again}"
    if _major(device.driver) < _major(record.device.driver):
        return (
            f"the engine was built with driver {record.device.driver}, this machine has {device.driver}: "
            f"install driver {_major(record.device.driver)} or newer, or build it again here"
        )
    return None


def _wrong_tensorrt(record: EngineRecord, version: str | None) -> str | None:
    built = f"the engine was built with TensorRT {record.tensorrt}"
    if version is None:
        return f"{built}, this machine has none: pip install tensorrt-cu13=={record.tensorrt}"
    there, here = _numbers(record.tensorrt), _numbers(version)
    if record.version == "compatible":
        if here[:2] < there[:2]:
            return f"{built} and loads with that or newer versions; this machine has {version}"
        return None
    if here[:3] != there[:3]:
        return (
            f"{built}, this machine has {version}: pip install tensorrt-cu13=={record.tensorrt}, build it again here, "
            "or there with --version compatible"
        )
    return None


def _major(version: str) -> int:
    return _numbers(version)[0]


def _numbers(version: str) -> tuple[int, ...]:
    words = version.split("+")[0].split(".")
    return tuple(int("".join(c for c in word if c.isdigit()) or 0) for word in words)


def write_record(path: Path, record: EngineRecord) -> None:
    path.write_text(json.dumps(record.options(), indent=1) + "\n")


def read_record(path: Path) -> EngineRecord:
    """Read the record next to plans; raises ArtifactError, which names the file."""
    try:
        return EngineRecord.read(json.loads(path.read_text()))
    except (OSError, json.JSONDecodeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); write the deployment again") from None
