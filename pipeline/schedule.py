"""Sigmas and timesteps of FLUX.2, equal to diffusers' FlowMatchEulerDiscreteScheduler and `compute_empirical_mu`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kit.configs import TRAIN_TIMESTEPS
from kit.dtypes import Compute, numpy_type

Float32 = npt.NDArray[np.float32]


def empirical_mu(image_tokens: int, steps: int) -> float:
    """Return the time shift mu: two lines fitted by Black Forest Labs at 10 and 200 steps, interpolated by steps.

    Above 4300 tokens the 200-step line is used for any number of steps, so mu jumps there. Only the tokens of the
    generated image count, not those of reference images.
    """
    at_200 = 0.00016927 * image_tokens + 0.45666666
    if image_tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * image_tokens + 1.89833333
    slope = (at_200 - at_10) / 190.0
    return slope * steps + (at_200 - 200.0 * slope)


def sigmas(image_tokens: int, steps: int, given: Sequence[float] = ()) -> Float32:
    """Return `steps` + 1 noise levels down to 0, float32.

    They are evenly spaced from 1, or `given`, before the time shift, which diffusers applies to given ones too.
    """
    exp_mu = math.exp(empirical_mu(image_tokens, steps))
    linear = np.array(given if given else np.linspace(1.0, 1.0 / steps, steps)).astype(np.float32)
    shifted = exp_mu / (exp_mu + (1 / linear - 1) ** 1.0)
    return np.append(shifted.astype(np.float32), np.float32(0))


def timesteps(levels: Float32, compute: Compute) -> Float32:
    """Return the values of the transformer's `timestep` port at each step, [steps], float32.

    diffusers multiplies sigma by 1000, rounds to the dtype of the latents, and divides by 1000 in that dtype. In bf16
    this moves timesteps by up to 2 in 1000 (907.49 becomes 908), which changes the image, so it is reproduced here.
    """
    scaled = levels[:-1] * np.float32(TRAIN_TIMESTEPS)
    if compute == "fp32":
        return scaled / np.float32(TRAIN_TIMESTEPS)
    # torch divides a bf16 tensor by a number in float32 and rounds the quotient
    rounded = scaled.astype(numpy_type("bf16")).astype(np.float32)
    return (rounded / np.float32(TRAIN_TIMESTEPS)).astype(numpy_type("bf16")).astype(np.float32)
