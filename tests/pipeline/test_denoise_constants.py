"""What does not change from step to step is stacked once, read-only, so that an engine need not copy it again."""

from __future__ import annotations

import pytest

from pipeline.denoise import Denoiser
from tests.pipeline.test_denoise import Recorder, small, start

CONSTANT = ("encoder_hidden_states", "img_ids", "txt_ids")


@pytest.mark.parametrize("name", ["klein-4b", "klein-base-4b", "dev"])
def test_a_company_of_jobs_hands_the_engine_the_same_read_only_arrays_at_every_step(name: str) -> None:
    engine = Recorder(small(name))
    denoiser = Denoiser(small(name), "fp32", engine)
    jobs = [start(denoiser, seed=seed) for seed in (1, 2)]
    for _ in range(3):
        denoiser.step(jobs)
    first, *others = engine.inputs
    names = (*CONSTANT, "guidance") if name == "dev" else CONSTANT
    for constant in names:
        assert not first[constant].flags.writeable
        assert all(call[constant] is first[constant] for call in others)
    assert all(call["hidden_states"] is not first["hidden_states"] for call in others)


def test_when_the_company_changes_the_arrays_are_stacked_anew_and_the_old_ones_let_go() -> None:
    engine = Recorder(small("klein-4b"))
    denoiser = Denoiser(small("klein-4b"), "fp32", engine)
    early, late, other = start(denoiser, seed=1), start(denoiser, seed=2), start(denoiser, seed=3, width=128)
    denoiser.step([early])
    denoiser.step([early, late, other])
    alone, both, wide = engine.inputs
    assert both["encoder_hidden_states"].shape[0] == 2
    assert alone["img_ids"] is not both["img_ids"]
    denoiser.step([other])
    assert engine.inputs[-1]["img_ids"] is wide["img_ids"], "a step of another size did not disturb it"
    assert list(denoiser._constant) == [other.latents.shape[1]], "what finished jobs needed is gone"
