"""Sigmas and timesteps of FLUX.2, exact to diffusers' FlowMatchEulerDiscreteScheduler and `compute_empirical_mu`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from kit.errors import CheckpointError
from kit.ports import Compute

Float32 = npt.NDArray[np.float32]
TRAIN_TIMESTEPS = 1000

# What the family's scheduler_config.json must say for the formulas below to hold.
EXPECTED_CONFIG: Mapping[str, Any] = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": TRAIN_TIMESTEPS,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}
_REQUIRED = ("_class_name", "num_train_timesteps", "use_dynamic_shifting")  # the others may be left out


def check_config(config: Mapping[str, Any], where: str) -> None:
    """Raise CheckpointError when a scheduler config asks for a schedule that this module does not compute."""
    for key, expected in EXPECTED_CONFIG.items():
        # diffusers writes False for unset beta/karras switches in some versions and null in others
        found = config.get(key, None if key in _REQUIRED else expected)
        if found != expected and (found or expected):
            raise CheckpointError(f"{where}: {key} is {found!r}; FLUX.2 schedules have {expected!r}")


def empirical_mu(image_tokens: int, steps: int) -> float:
    """Return the time shift mu: two lines fitted by Black Forest Labs at 10 and 200 steps, interpolated in steps.

    Above 4300 tokens the 200-step line is used whatever the number of steps, so mu jumps there. Only tokens of the
    picture that is painted count, not those of reference pictures.
    """
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


def sigmas(image_tokens: int, steps: int) -> Float32:
    """Return the `steps` + 1 noise levels from 1 down to 0, float32."""
    exp_mu = math.exp(empirical_mu(image_tokens, steps))
    linear = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
    shifted = exp_mu / (exp_mu + (1 / linear - 1) ** 1.0)
    return np.append(shifted.astype(np.float32), np.float32(0))


def timesteps(levels: Float32, compute: Compute) -> Float32:
    """Return what the transformer's `timestep` port is fed at each step, [steps], float32 values.

    diffusers multiplies sigma by 1000, rounds to the dtype of the latents, and divides by 1000 in that dtype. In bf16
    the rounding moves timesteps by up to 2 in 1000 (907.49 becomes 908), so it is part of the picture.
    """
    scaled = levels[:-1] * np.float32(TRAIN_TIMESTEPS)
    if compute == "fp32":
        return scaled / np.float32(TRAIN_TIMESTEPS)
    # torch divides a bf16 tensor by a number in float32 and rounds the quotient
    rounded = scaled.astype(ml_dtypes.bfloat16).astype(np.float32)
    return (rounded / np.float32(TRAIN_TIMESTEPS)).astype(ml_dtypes.bfloat16).astype(np.float32)
