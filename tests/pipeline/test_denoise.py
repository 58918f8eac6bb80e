"""The denoising loop with a simple engine: no model, no server."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kit.dtypes import Compute
from kit.engine import Array
from kit.errors import EngineError, RequestError
from kit.ports import ports
from kit.variants import VARIANTS, Variant
from pipeline.denoise import Denoiser
from pipeline.live_request import LiveRequest
from pipeline.noise import initial_latents
from pipeline.position_ids import image_ids, text_ids
from pipeline.request import Limits, check


def small(name: str) -> Variant:
    """Shrink a variant's text length and width so that rows are small."""
    variant = VARIANTS[name]
    return replace(variant, text_tokens=16, transformer=replace(variant.transformer, joint_dim=12))


class Recorder:
    """An engine whose velocity depends on every input of its row; it records its inputs."""

    def __init__(self, variant: Variant) -> None:
        self.ports = ports("transformer", variant, "fp32")
        self.calls: list[int] = []
        self.inputs: list[Mapping[str, Array]] = []

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        assert sorted(inputs) == sorted(port.name for port in self.ports.inputs)
        for port in self.ports.inputs:
            sizes = {"batch": len(inputs["timestep"]), "image_tokens": inputs["hidden_states"].shape[1]}
            assert inputs[port.name].shape == port.shape(sizes), port.name
        self.calls.append(len(inputs["timestep"]))
        self.inputs.append(inputs)
        hidden, text = (inputs[name].astype(np.float64) for name in ("hidden_states", "encoder_hidden_states"))
        scalars = [inputs[name].astype(np.float64) for name in ("timestep", "guidance") if name in inputs]
        weight = sum(scalars, text.mean(axis=(1, 2)))
        places = inputs["img_ids"].sum(axis=-1)[..., None]
        return {"velocity": (0.1 * hidden + weight[:, None, None] + 0.01 * places).astype(np.float32)}


def start(denoiser: Denoiser, **changes: Any) -> LiveRequest:
    """Admit a small request; `changes` are request fields."""
    variant = denoiser.variant
    fields = {"prompt": "a cat", "seed": 1, "width": 64, "height": 64, "steps": 4} | changes
    text = embeds(variant)
    request = check(fields, variant, Limits(min_side=16))
    return denoiser.admit(request, text, -text if variant.guidance == "cfg" else None)


def embeds(variant: Variant) -> np.ndarray[Any, Any]:
    return np.full((variant.text_tokens, variant.transformer.joint_dim), 0.5, np.float32)


def run_alone(name: str, **changes: Any) -> LiveRequest:
    denoiser = Denoiser(small(name), "fp32", Recorder(small(name)))
    job = start(denoiser, **changes)
    while not job.done:
        denoiser.step([job])
    return job


@pytest.mark.parametrize("name", ["klein-4b", "klein-base-4b", "dev"])
def test_a_request_gives_the_same_latents_alone_and_in_shared_batches(name: str) -> None:
    wishes: list[dict[str, Any]] = [
        {"seed": 1, "steps": 4},
        {"seed": 2, "steps": 8, "num_images": 2},
        {"seed": 3, "steps": 20, "width": 128},
        {"seed": 4, "steps": 6, "width": 96, "height": 48},
    ]
    denoiser = Denoiser(small(name), "fp32", Recorder(small(name)), max_rows=6)
    live: list[LiveRequest] = []
    started: list[LiveRequest] = []
    for tick in range(40):
        if tick % 2 == 0 and len(started) < len(wishes):  # arrivals are staggered
            started.append(start(denoiser, **wishes[len(started)]))
            live.append(started[-1])
        denoiser.step(live)
        live = [job for job in live if not job.done]
    assert not live
    assert denoiser.occupancy.fullest >= 2
    for job, wish in zip(started, wishes, strict=True):
        assert np.array_equal(job.latents, run_alone(name, **wish).latents)


def test_guidance_takes_two_passes_in_one_call() -> None:
    engine = Recorder(small("klein-base-4b"))
    denoiser = Denoiser(small("klein-base-4b"), "fp32", engine)
    denoiser.step([start(denoiser, num_images=2)])
    assert engine.calls == [4]
    means = engine.inputs[0]["encoder_hidden_states"].mean(axis=(1, 2))
    assert means.tolist() == [-0.5, -0.5, 0.5, 0.5]


def test_guidance_of_one_on_a_base_variant_takes_one_pass() -> None:
    engine = Recorder(small("klein-base-4b"))
    denoiser = Denoiser(small("klein-base-4b"), "fp32", engine)
    denoiser.step([start(denoiser, guidance=1.0)])
    assert engine.calls == [1]


def test_guidance_is_an_input_of_dev() -> None:
    engine = Recorder(small("dev"))
    denoiser = Denoiser(small("dev"), "fp32", engine)
    denoiser.step([start(denoiser, guidance=2.5), start(denoiser, guidance=4.0)])
    assert engine.inputs[0]["guidance"].tolist() == [2.5, 4.0]


def test_requests_of_one_size_share_a_call_up_to_max_rows() -> None:
    engine = Recorder(small("klein-4b"))
    denoiser = Denoiser(small("klein-4b"), "fp32", engine, max_rows=4)
    denoiser.step([start(denoiser, num_images=n) for n in (2, 2, 1, 4)] + [start(denoiser, width=128)])
    assert engine.calls == [4, 1, 4, 1]
    assert (denoiser.occupancy.rows, denoiser.occupancy.steps, denoiser.occupancy.fullest) == (10, 5, 2)


def test_a_landscape_and_a_portrait_with_equal_tokens_share_a_call() -> None:
    engine = Recorder(small("klein-4b"))
    denoiser = Denoiser(small("klein-4b"), "fp32", engine)
    denoiser.step([start(denoiser, width=128, height=64), start(denoiser, width=64, height=128)])
    assert engine.calls == [2]
    wide, tall = engine.inputs[0]["img_ids"]
    assert wide.max(axis=0).tolist() == [0, 3, 7, 0]
    assert tall.max(axis=0).tolist() == [0, 7, 3, 0]


def test_a_failed_call_fails_only_its_own_requests() -> None:
    class Breaks(Recorder):
        def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
            if inputs["hidden_states"].shape[1] == 32:
                raise EngineError("out of memory")
            return super().run(inputs)

    denoiser = Denoiser(small("klein-4b"), "fp32", Breaks(small("klein-4b")))
    good, bad = start(denoiser), start(denoiser, width=128)
    denoiser.step([good, bad])
    assert (good.error, good.index) == (None, 1)
    assert (bad.error, bad.index) == ("out of memory", 0)


@pytest.mark.parametrize(("compute", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_noise_equals_that_of_a_cpu_generator(compute: Compute, dtype: torch.dtype) -> None:
    noise = torch.randn((2, 128, 3, 5), generator=torch.Generator("cpu").manual_seed(9), dtype=dtype)
    packed = initial_latents(VARIANTS["klein-4b"], 9, 2, width=80, height=48, compute=compute)
    assert packed.shape == (2, 15, 128)
    assert np.array_equal(packed[1, 7], noise[1, :, 1, 2].float().numpy())


def test_latents_unpack_to_rows_and_columns() -> None:
    denoiser = Denoiser(small("klein-4b"), "fp32", Recorder(small("klein-4b")))
    job = start(denoiser, width=80, height=48)
    assert job.image_latents().shape == (1, 128, 3, 5)
    assert np.array_equal(job.image_latents()[0, :, 1, 2], job.latents[0, 7])


def test_ids_count_rows_columns_and_text() -> None:
    assert image_ids(2, 2).tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]
    assert text_ids(2).tolist() == [[0, 0, 0, 0], [0, 0, 0, 1]]


def test_a_request_that_cannot_run_is_rejected() -> None:
    variant = small("klein-base-4b")
    denoiser = Denoiser(variant, "fp32", Recorder(variant))
    request = check({"prompt": "a cat"}, variant, Limits())
    with pytest.raises(RequestError, match=r"prompt_embeds: shape \[3, 12\] is not \[16, 12\]"):
        denoiser.admit(request, np.zeros((3, 12), np.float32), embeds(variant))
    with pytest.raises(RequestError, match="guidance 4 on klein-base-4b needs negative_embeds"):
        denoiser.admit(request, embeds(variant))
