"""Memory, a stream and graphs of one GPU, by way of torch: all that the TensorRT runtime asks of CUDA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kit.dtypes import Dtype, to_array, to_tensor, torch_type
from kit.engine import Array


class Device(Protocol):
    """What the runtime needs; a test has one on the CPU."""

    @property
    def stream(self) -> int:
        """The stream on which everything runs, as the number that TensorRT takes."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: Dtype) -> Any:
        """Return memory of the device with `data_ptr()`."""
        ...

    def upload(self, target: Any, array: Array) -> None: ...

    def download(self, source: Any) -> Array:
        """Wait for the stream and return the values."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` enqueues and return what replays it."""
        ...


class Cuda:
    """One GPU; copies run on the stream of the engines, so that they need no events between them."""

    def __init__(self, index: int = 0) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda", index)
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> int:
        return int(self._stream.cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: Dtype) -> Any:
        with self._torch.cuda.stream(self._stream):  # whose memory torch then keeps for this stream
            return self._torch.empty(shape, dtype=torch_type(dtype), device=self._device)

    def upload(self, target: Any, array: Array) -> None:
        with self._torch.cuda.stream(self._stream):
            target.copy_(to_tensor(array))

    def download(self, source: Any) -> Array:
        with self._torch.cuda.stream(self._stream):
            values = source.to("cpu")
        self._stream.synchronize()
        return to_array(values)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        from runtimes.cuda_graph import CudaGraph

        graph = CudaGraph(work, self._stream)

        def replay() -> None:
            with self._torch.cuda.stream(self._stream):
                graph.replay()

        return replay
