"""The device of the TensorRT runtime, checked against torch's real signatures without a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import create_autospec

import ml_dtypes
import numpy as np
import pytest
import torch

from runtimes.trt.cuda import Cuda


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """A Cuda whose memory is the CPU's; classes and functions of torch.cuda are autospecs of the real ones."""
    stream = create_autospec(torch.cuda.Stream, instance=True)
    stream.cuda_stream = 77
    stream.device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "current_stream", create_autospec(torch.cuda.current_stream))
    streams = create_autospec(torch.cuda.Stream, return_value=stream)
    monkeypatch.setattr(torch.cuda, "Stream", streams)
    monkeypatch.setattr(torch.cuda, "stream", create_autospec(torch.cuda.stream, side_effect=lambda s: nullcontext()))
    graph = create_autospec(torch.cuda.CUDAGraph, instance=True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", create_autospec(torch.cuda.CUDAGraph, return_value=graph))
    context = create_autospec(torch.cuda.graph, side_effect=lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", context)
    made = Cuda(1)
    streams.assert_called_once_with(torch.device("cuda", 1))
    made._device = torch.device("cpu")
    return made


def test_everything_runs_on_one_stream(device: Cuda) -> None:
    assert device.stream == 77
    target = device.empty((2, 3), "bf16")
    assert (target.shape, target.dtype) == ((2, 3), torch.bfloat16)
    values = np.arange(6, dtype=np.float32).reshape(2, 3).astype(ml_dtypes.bfloat16)
    device.upload(target, values)
    found = device.download(target)
    assert np.array_equal(found.view(np.int16), values.view(np.int16))
    used: Any = torch.cuda.stream
    assert [call.args for call in used.call_args_list] == [(device._stream,)] * 3
    device._stream.synchronize.assert_called_once_with()


def test_work_is_captured_on_the_stream_of_the_engines_and_replayed_there(device: Cuda) -> None:
    done: list[str] = []
    replay = device.capture(lambda: done.append("enqueued"))
    assert done == ["enqueued"]
    graph: Any = torch.cuda.graph
    graph.assert_called_once_with(
        torch.cuda.CUDAGraph.return_value,  # type: ignore[attr-defined]
        stream=device._stream,
        capture_error_mode="thread_local",
    )
    replay()
    torch.cuda.CUDAGraph.return_value.replay.assert_called_once_with()  # type: ignore[attr-defined]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_real_graph_replays_what_was_enqueued() -> None:
    device = Cuda()
    source, target = device.empty((4,), "fp32"), device.empty((4,), "fp32")
    device.upload(source, np.ones(4, np.float32))
    replay = device.capture(lambda: target.copy_(source).mul_(2))
    for factor in (1.0, 3.0):
        device.upload(source, np.full(4, factor, np.float32))
        replay()
        assert device.download(target).tolist() == [2 * factor] * 4
