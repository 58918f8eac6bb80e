"""The record of an engine: it survives the disk, and explains why an engine does not load on another machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit import cuda_device
from kit.cuda_device import CudaDevice, Machine, this_machine
from kit.errors import ArtifactError
from runtimes.trt.profiles import AxisRange, Profile
from runtimes.trt.record import EngineRecord, PlanRecord, mismatch

L4 = CudaDevice("NVIDIA L4", (8, 9), 23034 * 2**20, "580.65.06")
PROFILE = Profile("1024", {"batch": AxisRange(1, 1, 4), "image_tokens": AxisRange(16, 4096, 4096)})
RECORD = EngineRecord(
    gpu="l4",
    device=L4,
    tensorrt="11.4.0.106",
    weights="plan",
    hardware="exact",
    version="exact",
    build={"level": 3},
    plans={"transformer": (PlanRecord("transformer/model.plan", (PROFILE,), 123, {"layers": 4}),)},
)
HERE = Machine(L4, "11.4.0.106")


def test_a_record_survives_the_disk() -> None:
    assert EngineRecord.read(json.loads(json.dumps(RECORD.options()))) == RECORD


@pytest.mark.parametrize("key", ["device", "plans", "weights"])
def test_a_record_without_a_key_is_invalid(key: str) -> None:
    options = {name: value for name, value in RECORD.options().items() if name != key}
    with pytest.raises(ArtifactError, match="the manifest of an engine is invalid .*build it again"):
        EngineRecord.read(options)


def test_an_engine_loads_where_it_was_built() -> None:
    assert mismatch(RECORD, HERE) is None


A40 = replace(L4, title="NVIDIA A40", compute_capability=(8, 6))
RTX = replace(L4, title="NVIDIA GeForce RTX 4090")
T4 = replace(L4, title="Tesla T4", compute_capability=(7, 5))


@pytest.mark.parametrize(
    ("changed", "machine", "words"),
    [
        (
            {},
            Machine(None, "11.4.0.106"),
            "built on NVIDIA L4 .compute capability 8.9., but nvidia-smi lists no GPU on this machine",
        ),
        (
            {},
            Machine(RTX, "11.4.0.106"),
            "this machine has NVIDIA GeForce RTX 4090 .8.9.: build it again here, or there",
        ),
        ({"hardware": "same-capability"}, Machine(RTX, "11.4.0.106"), None),
        (
            {"hardware": "same-capability"},
            Machine(A40, "11.4.0.106"),
            "NVIDIA A40 .8.6.: .* with --hardware ampere-plus",
        ),
        ({"hardware": "ampere-plus"}, Machine(A40, "11.4.0.106"), None),
        (
            {"hardware": "ampere-plus"},
            Machine(T4, "11.4.0.106"),
            "Tesla T4 .7.5.: it needs Ampere or newer",
        ),
        (
            {},
            Machine(replace(L4, driver="575.1"), "11.4.0.106"),
            "with driver 580.65.06, this machine has 575.1: install",
        ),
        ({}, Machine(replace(L4, driver="590.1"), "11.4.0.106"), None),
        ({}, Machine(L4, None), "this machine has none: pip install tensorrt-cu13==11.4.0.106"),
        ({}, Machine(L4, "11.5.0.1"), "with TensorRT 11.4.0.106, this machine has 11.5.0.1: pip install"),
        ({}, Machine(L4, "10.16.1.11"), "this machine has 10.16.1.11: .* or there with --version compatible"),
        ({"version": "compatible"}, Machine(L4, "11.5.0.1"), None),
        (
            {"version": "compatible"},
            Machine(L4, "10.16.1.11"),
            "loads with that or newer versions; this machine has 10.16.1.11",
        ),
    ],
)
def test_another_machine_is_rejected_with_the_reason(
    changed: dict[str, Any], machine: Machine, words: str | None
) -> None:
    import re

    why = mismatch(replace(RECORD, **changed), machine)
    assert why is None if words is None else re.search(words, why or ""), why


@pytest.mark.parametrize(
    ("here", "words"),
    [
        ("1.7.1.116", None),
        ("1.7.1.120", None),
        (
            "1.7.0.9",
            "with TensorRT for RTX 1.7.1.116, this machine has 1.7.0.9: pip install tensorrt-rtx-cu13-bindings==",
        ),
        ("1.8.0.1", "this machine has 1.8.0.1: .* or build it again with this version"),
        ("2.0.0.1", "this machine has 2.0.0.1"),
        (None, "this machine has none: pip install 'flux2-deploy.tensorrt-rtx.'"),
    ],
)
def test_engines_of_tensorrt_for_rtx_load_with_the_same_release(here: str | None, words: str | None) -> None:
    import re

    why = mismatch(replace(RECORD, compiler="tensorrt-rtx", tensorrt="1.7.1.116"), Machine(L4, None, here))
    assert why is None if words is None else re.search(words, why or ""), why


def test_a_part_that_was_not_built_is_named() -> None:
    with pytest.raises(ArtifactError, match="the engine has no vae_decoder; it has: transformer"):
        RECORD.plans_of("vae_decoder")


def test_this_machine_is_what_nvidia_smi_and_package_metadata_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_device, "devices", lambda: ((replace(L4, free_bytes=1),), None))
    monkeypatch.setattr(cuda_device, "versions", lambda: {"tensorrt-cu12": "10.16.1.11", "torch": "2"})
    assert this_machine() == Machine(L4, "10.16.1.11")
    assert this_machine(1).device is None
    assert L4.name == "l4"
    assert replace(L4, title="Quadro").name is None
    monkeypatch.setattr(cuda_device, "devices", lambda: ((), "no nvidia-smi"))
    monkeypatch.setattr(cuda_device, "versions", dict)
    assert this_machine() == Machine(None, None)


def test_a_capability_that_the_driver_does_not_report_is_zero(tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'Old, 1, [N/A], [N/A], 1'\n")
    program.chmod(0o755)
    assert cuda_device.devices(str(program)) == ((CudaDevice("Old", (0, 0), 2**20, "1"),), None)


def test_free_memory_is_not_part_of_a_record() -> None:
    busy = replace(RECORD, device=replace(L4, free_bytes=1))
    assert busy == RECORD
    assert busy.options() == RECORD.options()
    assert set(RECORD.options()["device"]) == {"title", "compute_capability", "memory_bytes", "driver"}
