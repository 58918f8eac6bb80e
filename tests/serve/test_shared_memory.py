"""Shared memory that is too small for a deployment is told before a request fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from kit.variants import VARIANTS
from pipeline.request import Limits
from planner.shared_memory import Traffic, problem, shared_bytes
from serve.preflight import memory_problem
from serve.settings import Settings, TensorRtModel, Tuning

KLEIN = VARIANTS["klein-4b"]
DOCKER = 64 * 2**20


def test_the_defaults_are_those_of_a_deployment() -> None:
    limits, tuning = Limits(), Tuning()
    assert Traffic() == Traffic(tuning.text_batch, tuning.vae_batch, limits.max_images, limits.max_pixels)


def test_what_docker_gives_is_too_small_for_klein_and_the_cure_is_said(tmp_path: Path) -> None:
    settings = Settings(KLEIN, "fp32", Limits(), Tuning())
    (tmp_path / "tokenizer" / "1").mkdir(parents=True)
    settings.write(tmp_path / "tokenizer" / "1")
    said = memory_problem(tmp_path, DOCKER)
    assert said is not None
    assert said.startswith("/dev/shm has 0.1 GB free, requests at the limits need up to 0.")
    assert "--shm-size=2g" in said
    assert memory_problem(tmp_path, 2**31) is None
    assert memory_problem(tmp_path, None) is None


def test_smaller_limits_and_native_models_need_less() -> None:
    whole = shared_bytes(KLEIN, "fp32", Traffic())
    assert shared_bytes(KLEIN, "fp32", Traffic(), python_text=False, python_vae=False) < whole
    assert shared_bytes(KLEIN, "bf16", Traffic()) < whole
    assert shared_bytes(KLEIN, "fp32", replace(Traffic(), max_pixels=512 * 512, text_batch=1)) < whole / 2


def test_nothing_is_said_without_shared_memory_or_with_enough() -> None:
    assert problem(None, 10) is None
    assert problem(10, 10) is None


def test_parts_in_triton_s_own_backend_pass_no_tensors_through_python(tmp_path: Path) -> None:
    plan = TensorRtModel("tensorrt_plan", 1, 1)
    settings = Settings(KLEIN, "bf16", Limits(), Tuning(), tensorrt={"text_encoder": plan, "vae_decoder": plan})
    (tmp_path / "tokenizer" / "1").mkdir(parents=True)
    settings.write(tmp_path / "tokenizer" / "1")
    needed = shared_bytes(KLEIN, "bf16", Traffic(), python_text=False, python_vae=False)
    assert memory_problem(tmp_path, needed) is None
    assert memory_problem(tmp_path, needed - 1) is not None
