"""Sigmas and timesteps compared with diffusers' own scheduler, number by number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from kit.configs import check_scheduler
from kit.dtypes import Compute
from kit.errors import CheckpointError
from pipeline import schedule

CONFIG = {
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}
CASES = [(tokens, steps) for tokens in (16, 48, 1024, 4096, 4300, 4301, 16384) for steps in (1, 2, 4, 8, 28, 50)]


@pytest.mark.parametrize(("tokens", "steps"), CASES)
def test_mu_is_the_empirical_mu_of_diffusers(tokens: int, steps: int) -> None:
    assert schedule.empirical_mu(tokens, steps) == compute_empirical_mu(tokens, steps)


@pytest.mark.parametrize(("tokens", "steps"), CASES)
def test_given_sigmas_are_shifted_as_the_scheduler_shifts_them(tokens: int, steps: int) -> None:
    given = [float(x) for x in np.geomspace(1.0, 0.0003, steps)]
    scheduler = FlowMatchEulerDiscreteScheduler(**CONFIG)
    scheduler.set_timesteps(sigmas=given, mu=compute_empirical_mu(tokens, steps), device="cpu")
    assert np.array_equal(schedule.sigmas(tokens, steps, given), scheduler.sigmas.numpy())


@pytest.mark.parametrize(("tokens", "steps"), CASES)
def test_sigmas_are_bit_equal_to_the_scheduler(tokens: int, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**CONFIG)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps), device="cpu"
    )
    assert np.array_equal(schedule.sigmas(tokens, steps), scheduler.sigmas.numpy())


@pytest.mark.parametrize(("compute", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(("tokens", "steps"), CASES)
def test_timesteps_are_rounded_as_the_pipeline_rounds_them(
    tokens: int, steps: int, compute: Compute, dtype: torch.dtype
) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**CONFIG)
    scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=compute_empirical_mu(tokens, steps), device="cpu"
    )
    expected = [float((t.expand(1).to(dtype) / 1000)[0]) for t in scheduler.timesteps]
    assert schedule.timesteps(schedule.sigmas(tokens, steps), compute).tolist() == expected


def test_mu_jumps_above_4300_tokens() -> None:
    assert schedule.empirical_mu(4300, 4) > 2.29
    assert schedule.empirical_mu(4301, 4) < 1.19


def test_the_family_config_is_accepted() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**CONFIG)
    check_scheduler(dict(scheduler.config) | {"_class_name": type(scheduler).__name__}, "scheduler")


@pytest.mark.parametrize(
    ("key", "value"),
    [("_class_name", "DDIMScheduler"), ("use_dynamic_shifting", False), ("use_karras_sigmas", True)],
)
def test_another_schedule_is_rejected_with_its_key(key: str, value: object) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **CONFIG, key: value}
    with pytest.raises(CheckpointError, match=f"scheduler_config.json: {key} is {value!r}"):
        check_scheduler(config, "scheduler_config.json")
