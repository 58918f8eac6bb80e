"""The execution providers of ONNX Runtime as data: what each is called, where it comes from and where it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from kit.errors import UsageError

ProviderName = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]


@dataclass(frozen=True)
class Provider:
    """One execution provider."""

    name: ProviderName
    title: str  # ONNX Runtime's name
    install: str  # what to tell a user who does not have it
    next: tuple[str, ...] = ()  # providers on the GPU for what it leaves over, by ONNX Runtime's names
    graph_id: str = ""  # option of a run: which CUDA graph it records or replays
    plugin: str = ""  # module whose library registers the provider; empty: it is in onnxruntime itself
    targets: tuple[str, ...] = ()  # compute capabilities it runs on, empty: all

    @property
    def on_gpu(self) -> bool:
        return self.name != "cpu"


PROVIDERS: Mapping[str, Provider] = {
    row.name: row
    for row in (
        Provider("cpu", "CPUExecutionProvider", "pip install onnxruntime"),
        Provider(
            "cuda",
            "CUDAExecutionProvider",
            "pip install onnxruntime-gpu in place of onnxruntime, with CUDA 13 and cuDNN 9",
            graph_id="gpu_graph_id",
        ),
        Provider(
            "tensorrt",
            "TensorrtExecutionProvider",
            "pip install onnxruntime-gpu in place of onnxruntime, with CUDA 13, cuDNN 9 and TensorRT",
            next=("CUDAExecutionProvider",),
            graph_id="gpu_graph_id",
        ),
        Provider(
            "tensorrt-rtx",
            "NvTensorRTRTXExecutionProvider",
            "pip install onnxruntime-ep-nv-tensorrt-rtx-cu13",
            graph_id="cuda_graph_annotation_id",
            plugin="onnxruntime_ep_nv_tensorrt_rtx",
            targets=("8.6", "8.9", "12.0"),
        ),
    )
}


def provider(name: str) -> Provider:
    """Look a provider up by name; raises UsageError that lists them."""
    if name not in PROVIDERS:
        raise UsageError(f"unknown provider {name!r}; there are: {', '.join(PROVIDERS)}")
    return PROVIDERS[name]
