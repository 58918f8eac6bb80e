"""The doctor: what it reads from a machine, and what it concludes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from kit import software
from kit.__main__ import main
from kit.cuda_device import CudaDevice, devices
from kit.gpus import GB, MIB, gpu
from kit.hardware import Cpu, Hardware, look
from kit.variants import VARIANTS
from planner import doctor
from planner.doctor import cpu_bytes, render, verdicts

L4 = CudaDevice("NVIDIA L4", (8, 9), 23034 * MIB, "570.86.15", 22500 * MIB)
BARE = Hardware(Cpu("AMD EPYC", 8, ("avx2", "avx512_vnni")), 64 * GB, 60 * GB, 500 * GB, (), "no driver")
FULL = dict.fromkeys(software.EXPORT, "1.0")


def program(folder: Path, script: str) -> str:
    path = folder / "nvidia-smi"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path) -> None:
    rows = "echo 'NVIDIA L4, 23034, 22500, 8.9, 570.86.15'\necho 'Tesla V100-SXM2-16GB, 16384, 16000, 7.0, 570.86.15'"
    found, problem = devices(program(tmp_path, rows))
    assert found[0] == L4
    assert found[0].free_bytes == L4.free_bytes
    assert found[0].known is gpu("l4")
    assert found[1].known is None
    assert problem is None


def test_memory_that_nvidia_smi_does_not_tell_is_zero(tmp_path: Path) -> None:
    found, _ = devices(program(tmp_path, "echo 'NVIDIA GB10, [N/A], [N/A], 12.1, 580.1'"))
    assert (found[0].memory_bytes, found[0].free_bytes) == (0, 0)


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", "nvidia-smi failed: NVIDIA-SMI has failed: no driver"),
        ("exit 3", "nvidia-smi failed: exit code 3"),
        ("true", "nvidia-smi lists no GPU"),
        ("exec sleep 5", "nvidia-smi did not answer within 0.2 s"),
    ],
)
def test_a_silent_or_failing_nvidia_smi_is_said(tmp_path: Path, script: str, problem: str) -> None:
    assert devices(program(tmp_path, script), timeout=0.2) == ((), problem)


def test_no_nvidia_smi_is_said(tmp_path: Path) -> None:
    assert devices(str(tmp_path / "none")) == ((), "no nvidia-smi, so no NVIDIA driver is installed here")


def test_the_cpu_and_the_memory_are_read_and_a_container_limits_them(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("model name : AMD EPYC 9004\nflags : fpu avx2 avx512_vnni amx_int8 foo\n")
    (tmp_path / "meminfo").write_text("MemTotal: 67108864 kB\nMemAvailable: 60000000 kB\n")
    (tmp_path / "memory.max").write_text(f"{8 * GB}\n")
    found = look(tmp_path, proc=tmp_path, groups=tmp_path)
    assert found.cpu.name == "AMD EPYC 9004"
    assert found.cpu.features == ("avx2", "avx512_vnni", "amx_int8")
    assert found.cpu.cores == len(os.sched_getaffinity(0))
    assert (found.memory, found.memory_available) == (8 * GB, 8 * GB)
    (tmp_path / "memory.max").write_text("max\n")
    assert look(tmp_path, proc=tmp_path, groups=tmp_path).memory == 67108864 * 1024


def words(hardware: Hardware, installed: dict[str, str], **kwargs: object) -> dict[str, tuple[bool, str]]:
    providers = kwargs.get("providers", ("CPUExecutionProvider",))
    server = kwargs.get("server")
    return {v.work: (v.can, v.words) for v in verdicts(hardware, installed, providers, server)}  # type: ignore[arg-type]


def test_a_machine_without_a_gpu_can_export_and_run_on_its_cpu() -> None:
    found = words(BARE, FULL)
    assert found["export to ONNX"][0]
    assert found["build and run TensorRT engines"] == (False, "no driver")
    can, said = found["run on the CPU with ONNX Runtime"]
    assert can
    assert "int8: the sample, klein-4b, klein-9b" in said
    assert "int8 is fast here (avx512_vnni)" in said
    assert found["serve with Triton"] == (False, words(BARE, {})["serve with Triton"][1])
    assert "pip install nvidia-pytriton" in found["serve with Triton"][1]


def test_what_is_missing_is_named() -> None:
    found = words(replace(BARE, cpu=Cpu("old", 2, ("avx2",))), {"torch": "2"}, providers=())
    assert found["export to ONNX"] == (
        False,
        "missing: diffusers, transformers, onnx, onnxscript, onnx-ir, safetensors",
    )
    assert "no ONNX Runtime: pip install onnxruntime" in found["run on the CPU with ONNX Runtime"][1]
    slow = words(replace(BARE, cpu=Cpu("old", 2, ("avx2",))), FULL)
    assert "int8 is slow here (no VNNI or AMX)" in slow["run on the CPU with ONNX Runtime"][1]


def test_a_gpu_says_its_recipe_and_what_does_not_fit() -> None:
    hardware = replace(BARE, gpus=(L4,), gpu_problem=None)
    can, said = words(hardware, FULL | {"tensorrt-cu13": "11.4"})["build and run TensorRT engines on NVIDIA L4"]
    assert can
    assert said.startswith("tensorrt-cu13 11.4; fp8: klein-4b, klein-9b, klein-9b-kv, klein-base-4b, klein-base-9b; ")
    assert "the transformer of dev in fp8 needs 34.0 GB" in said
    can, said = words(hardware, FULL)["build and run TensorRT engines on NVIDIA L4"]
    assert not can
    assert "no TensorRT wheel: pip install tensorrt-cu13 (recipe fp8)" in said


def test_onnx_runtime_on_a_gpu_needs_its_provider() -> None:
    hardware = replace(BARE, gpus=(L4,), gpu_problem=None)
    work = "run ONNX Runtime on NVIDIA L4 (--runtime ort-cuda)"
    assert words(hardware, FULL, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))[work][0]
    can, said = words(hardware, FULL)[work]
    assert not can
    assert said.startswith("no CUDAExecutionProvider: pip install onnxruntime-gpu in place of onnxruntime")
    rtx = "run ONNX Runtime on NVIDIA L4 (--runtime ort-tensorrt-rtx)"
    assert words(hardware, FULL, providers=("NvTensorRTRTXExecutionProvider",))[rtx][0]
    old = replace(L4, compute_capability=(8, 0))
    can, said = words(replace(hardware, gpus=(old,)), FULL, providers=("NvTensorRTRTXExecutionProvider",))[rtx]
    assert (can, said) == (
        False,
        "NvTensorRTRTXExecutionProvider runs on compute capability 8.6, 8.9, 12.0, this GPU has 8.0",
    )


def test_without_a_gpu_the_installed_providers_are_named() -> None:
    can, said = words(BARE, FULL, providers=("TensorrtExecutionProvider", "CUDAExecutionProvider"))[
        "run ONNX Runtime on a GPU"
    ]
    assert not can
    assert said.endswith("installed: CUDAExecutionProvider, TensorrtExecutionProvider")
    assert "no provider for one: pip install onnxruntime-gpu" in words(BARE, FULL)["run ONNX Runtime on a GPU"][1]


def test_a_gpu_that_is_not_in_the_table_is_said() -> None:
    hardware = replace(BARE, gpus=(CudaDevice("Tesla V100-SXM2-16GB", (7, 0), 16384 * MIB, "570"),), gpu_problem=None)
    can, said = words(hardware, FULL)["build and run TensorRT engines on Tesla V100-SXM2-16GB"]
    assert not can
    assert "this GPU is not in the kit's table" in said


def test_the_small_servers_need_of_an_old_numpy_is_said() -> None:
    server = software.tritonserver({software.SERVER: "0.7.0"})
    assert server == "of nvidia-pytriton 0.7.0"
    assert words(BARE, FULL | {"numpy": "1.26.4"}, server=server)["serve with Triton"][0]
    can, said = words(BARE, FULL | {"numpy": "2.1.0"}, server=server)["serve with Triton"]
    assert not can
    assert "numpy 2.1.0: the server of nvidia-pytriton needs numpy 1.26" in said


def test_int8_takes_a_quarter_of_fp32_and_klein_4b_fits_16_gb_in_int8() -> None:
    klein = VARIANTS["klein-4b"]
    assert cpu_bytes(klein, "int8") < 16 * GB < cpu_bytes(klein, "fp32")


def test_the_text_shows_everything() -> None:
    hardware = replace(BARE, gpus=(L4,), gpu_problem=None)
    found = verdicts(hardware, FULL, ("CPUExecutionProvider",), None)
    text = render(hardware, FULL, ("CPUExecutionProvider",), None, found, colour=False)
    assert "gpu     NVIDIA L4 (l4), 24.2 GB, 23.6 GB free, compute capability 8.9, driver 570.86.15" in text
    assert "cannot  serve with Triton" in text
    assert "\033[32mcan   \033[0m" in render(hardware, FULL, (), None, found, colour=True)


def test_this_machine_is_described_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["cpu"]["cores"] >= 1
    assert found["memory"] >= found["memory_available"] > 0
    assert found["versions"]["torch"]
    assert "CPUExecutionProvider" in found["onnxruntime_providers"]
    assert {verdict["work"] for verdict in found["can"]} >= {"export to ONNX", "serve with Triton"}


def test_shared_memory_as_small_as_dockers_is_told() -> None:
    small = replace(BARE, shared_free=64 * MIB)
    (found,) = (v for v in verdicts(small, FULL, (), "2.51 on PATH") if v.work == "serve with Triton")
    assert found.can
    assert "but for klein-4b /dev/shm has 0.1 GB free" in found.words
    (enough,) = (v for v in verdicts(BARE, FULL, (), "2.51 on PATH") if v.work == "serve with Triton")
    assert enough.words == "tritonserver 2.51 on PATH"


RTX = "compile plans with TensorRT for RTX (--compiler tensorrt-rtx)"
PROPER = "compile plans with TensorRT (--compiler tensorrt)"


def with_compilers(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Let the rows say that these versions are installed, or none."""
    monkeypatch.setattr(doctor, "installed_version", lambda row: versions.get(row.name.replace("-", "_")))
    monkeypatch.setattr(doctor, "missing_libraries", lambda row: None)


def test_both_compilers_say_what_they_can_target_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with_compilers(monkeypatch, tensorrt="11.4.0.106", tensorrt_rtx="1.7.1.116")
    found = words(BARE, FULL)
    assert found[PROPER] == (False, "11.4.0.106 needs the GPU that a plan is for, and finds none: no driver")
    can, said = found[RTX]
    assert can
    assert said.startswith("1.7.1.116, without a GPU: l4, a10g, a100-40g, ")
    assert "h100" not in said
    here = words(replace(BARE, gpus=(L4,), gpu_problem=None), FULL)
    assert here[PROPER] == (True, "11.4.0.106, on this machine's GPU: l4")


def test_a_compiler_that_is_missing_or_too_old_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with_compilers(monkeypatch)
    found = words(BARE, FULL)
    assert found[PROPER] == (False, "not installed: pip install tensorrt-cu13; it builds for the GPU of its machine")
    can, said = found[RTX]
    assert not can
    assert said.startswith("not installed: pip install 'flux2-deploy[tensorrt-rtx]'; it builds for l4, a10g")
    with_compilers(monkeypatch, tensorrt="10.12.0.36", tensorrt_rtx="1.6.0")
    found = words(BARE, FULL)
    assert "10.12.0.36 is installed, the kit builds with 10.13 to 11.x: pip install" in found[PROPER][1]
    assert "1.6.0 is installed, the kit builds with 1.7 to 1.x: pip install" in found[RTX][1]
