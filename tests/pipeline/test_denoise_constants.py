"""Inputs that stay the same at every step are stacked once per chunk, read-only, so that an engine can keep them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from pipeline.denoise import Denoiser
from pipeline.live_request import LiveRequest
from tests.pipeline.test_denoise import Recorder, small, start

CONSTANT = ("encoder_hidden_states", "img_ids", "txt_ids")


def denoiser_of(name: str = "klein-4b", max_rows: int = 16) -> tuple[Denoiser, Recorder]:
    engine = Recorder(small(name))
    return Denoiser(small(name), "fp32", engine, max_rows), engine


def stackings(engine: Recorder) -> int:
    """Count the different stacks that the engine was given; the recorder keeps them all alive."""
    return len({id(call["img_ids"]) for call in engine.inputs})


def start_many(denoiser: Denoiser, count: int) -> list[LiveRequest]:
    return [start(denoiser, seed=seed, steps=8) for seed in range(count)]


def run(denoiser: Denoiser, live: Sequence[LiveRequest], steps: int) -> None:
    for _ in range(steps):
        denoiser.step(live)


@pytest.mark.parametrize("name", ["klein-4b", "klein-base-4b", "dev"])
def test_a_chunk_gets_the_same_read_only_arrays_at_every_step(name: str) -> None:
    denoiser, engine = denoiser_of(name)
    run(denoiser, [start(denoiser, seed=seed) for seed in (1, 2)], 3)
    first, *others = engine.inputs
    names = (*CONSTANT, "guidance") if name == "dev" else CONSTANT
    for constant in names:
        assert not first[constant].flags.writeable
        assert all(call[constant] is first[constant] for call in others)
    assert all(call["hidden_states"] is not first["hidden_states"] for call in others)


def test_two_chunks_of_one_size_are_stacked_once_each() -> None:
    denoiser, engine = denoiser_of(max_rows=4)
    run(denoiser, start_many(denoiser, 8), 4)
    assert len(engine.calls) == 8
    assert stackings(engine) == 2


def test_a_request_that_joins_restacks_its_own_chunk_only() -> None:
    denoiser, engine = denoiser_of(max_rows=4)
    live = start_many(denoiser, 6)
    run(denoiser, live, 2)
    run(denoiser, [*live, start(denoiser, seed=9)], 2)
    assert stackings(engine) == 3


def test_a_request_that_leaves_restacks_its_own_chunk_only() -> None:
    denoiser, engine = denoiser_of(max_rows=4)
    live = start_many(denoiser, 6)
    run(denoiser, live, 2)
    run(denoiser, live[:-1], 2)
    assert stackings(engine) == 3


def test_a_step_of_another_size_does_not_restack() -> None:
    denoiser, engine = denoiser_of()
    early, late, other = start(denoiser, seed=1), start(denoiser, seed=2), start(denoiser, seed=3, width=128)
    denoiser.step([early])
    denoiser.step([early, late, other])
    alone, both, wide = engine.inputs
    assert both["encoder_hidden_states"].shape[0] == 2
    assert alone["img_ids"] is not both["img_ids"]
    denoiser.step([other])
    assert engine.inputs[-1]["img_ids"] is wide["img_ids"]


def test_arrays_of_chunks_that_are_gone_are_dropped() -> None:
    denoiser, _ = denoiser_of(max_rows=4)
    live = start_many(denoiser, 6)
    denoiser.step(live)
    assert [len(chunk) for chunk in denoiser._constants] == [4, 2]
    denoiser.step(live[:4])
    assert list(denoiser._constants) == [tuple(live[:4])]
    run(denoiser, live[:4], 6)
    assert all(request.done for request in live[:4])
    assert not denoiser._constants, "the last step of a chunk drops its arrays"
