"""Memory, a stream and CUDA graphs of one GPU through torch: all of CUDA that the TensorRT runtime needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from kit.dtypes import Dtype, to_array, to_tensor, torch_type
from kit.engine import Array


class Device(Protocol):
    """What the runtime needs of a GPU; tests have an implementation on the CPU."""

    @property
    def stream(self) -> int:
        """The stream of all work, as the handle that TensorRT takes."""
        ...

    def empty(self, shape: tuple[int, ...], dtype: Dtype) -> Any:
        """Return uninitialized device memory; it has `data_ptr()`."""
        ...

    def upload(self, target: Any, array: Array) -> None: ...

    def upload_transposed(self, target: Any, array: Array) -> None:
        """Copy a matrix of integers [N, K] to memory as [K, N]; the memory has its size in bytes."""
        ...

    def download(self, source: Any) -> Array:
        """Wait for the stream and return the values."""
        ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record what `work` enqueues; returns a function that replays it."""
        ...


class Cuda:
    """One GPU; copies run on the same stream as the engines, so no events are needed between them."""

    def __init__(self, index: int = 0) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda", index)
        self._stream: Any = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

    @property
    def stream(self) -> int:
        return int(self._stream.cuda_stream)

    def empty(self, shape: tuple[int, ...], dtype: Dtype) -> Any:
        with self._torch.cuda.stream(self._stream):  # so that torch reuses the memory on this stream only
            return self._torch.empty(shape, dtype=torch_type(dtype), device=self._device)

    def upload(self, target: Any, array: Array) -> None:
        with self._torch.cuda.stream(self._stream):
            target.copy_(to_tensor(array))

    def upload_transposed(self, target: Any, array: Array) -> None:
        with self._torch.cuda.stream(self._stream):
            staged = to_tensor(array).to(self._device)
            target.view(staged.dtype).view(staged.shape[::-1]).copy_(staged.t())

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
