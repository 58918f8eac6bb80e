"""The capture of a CUDA graph against torch's real signatures, and on a GPU where there is one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from runtimes.cuda_graph import WARM_UPS, CudaGraph, Replay


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace the classes and functions of torch.cuda by autospecs; returns the stream."""
    made = create_autospec(torch.cuda.Stream, instance=True)
    made.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "Stream", create_autospec(torch.cuda.Stream, return_value=made))
    monkeypatch.setattr(torch.cuda, "stream", create_autospec(torch.cuda.stream, side_effect=lambda s: nullcontext()))
    monkeypatch.setattr(torch.cuda, "current_stream", create_autospec(torch.cuda.current_stream, return_value="now"))
    graph = create_autospec(torch.cuda.CUDAGraph, instance=True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", create_autospec(torch.cuda.CUDAGraph, return_value=graph))
    context = create_autospec(torch.cuda.graph, side_effect=lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", context)
    return made


def test_work_runs_for_every_warm_up_and_once_for_the_capture(stream: Any) -> None:
    calls: list[int] = []

    def work() -> int:
        calls.append(len(calls))
        return len(calls)

    graph = CudaGraph(work, stream, warm_ups=2)
    assert (calls, graph.output) == ([0, 1, 2], 3)
    stream.wait_stream.assert_called_once_with("now")
    stream.synchronize.assert_called_once_with()
    capture: Any = torch.cuda.graph
    capture.assert_called_once_with(graph._graph, stream=stream, capture_error_mode="thread_local")
    graph.replay()
    assert len(calls) == 3, "a replay does not run Python"
    assert graph._graph.replay.call_count == 1  # type: ignore[attr-defined]


def test_a_replayed_package_copies_its_inputs_to_the_captured_addresses(stream: Any) -> None:
    calls: list[torch.Tensor] = []

    def call(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x

    given = torch.ones(3)
    replay = Replay(call, {"x": given})
    assert len(calls) == WARM_UPS + 1
    address = replay.inputs["x"].data_ptr()
    assert address != given.data_ptr(), "the caller's memory is not captured"
    output = replay({"x": torch.full((3,), 5.0)})
    assert output.tolist() == [5.0] * 3
    assert replay.inputs["x"].data_ptr() == address
    assert given.tolist() == [1.0] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_real_replay_computes_with_the_new_inputs() -> None:
    replay = Replay(lambda x: x * 2, {"x": torch.ones(4, device="cuda")})
    for factor in (1.0, 3.0):
        output = replay({"x": torch.full((4,), factor, device="cuda")})
        assert output.cpu().tolist() == [2 * factor] * 4
