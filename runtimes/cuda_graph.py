"""CUDA graphs: kernels are recorded once and launched as one, which removes the CPU's launch time from each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
WARM_UPS = 3


class CudaGraph(Generic[T]):
    """A recorded call; `output` is what it returned, overwritten by every replay.

    A replay runs on the stream that is current in torch. Memory that the call reads or writes must stay where it is.
    """

    def __init__(self, work: Callable[[], T], stream: Any, warm_ups: int = 0) -> None:
        """Run `work` `warm_ups` times on `stream`, then record it there.

        Warm-ups keep one-time work out of the graph: loading modules, compiling, allocating workspaces.
        """
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            for _ in range(warm_ups):
                work()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # other threads of a server may use CUDA meanwhile
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self.output = work()

    def replay(self) -> None:
        self._graph.replay()


class Replay:
    """A call on tensors as a CUDA graph; its inputs are copied to fixed addresses on the GPU."""

    def __init__(self, call: Callable[..., Tensor], example: Mapping[str, Tensor]) -> None:
        self.inputs = {name: x.clone() for name, x in example.items()}
        stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call,unused-ignore]
        self.graph = CudaGraph(lambda: call(**self.inputs), stream, WARM_UPS)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the output, which the next replay overwrites."""
        for name, x in inputs.items():
            self.inputs[name].copy_(x)
        self.graph.replay()
        return self.graph.output
