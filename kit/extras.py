"""Which extra of the distribution brings what a command imports.

pyproject.toml says the same in distributions and versions; tests/test_packaging.py holds the two together, and every
command's imports to the extra that is named here.
"""

from __future__ import annotations

from collections.abc import Mapping

_CLIENT = frozenset({"grpc", "numpy", "PIL", "google", "tritonclient"})
_MODELS = frozenset({"torch", "ml_dtypes", "onnx_ir", "safetensors", "transformers", "tokenizers"})
_EXPORT = _MODELS | {"numpy", "accelerate", "diffusers", "huggingface_hub", "onnx", "onnxscript", "tqdm"}
_SERVE = _CLIENT | _MODELS | {"onnxruntime"}
_QUALITY = _SERVE | {"flip_evaluator", "rapidocr", "skimage", "scipy", "tqdm"}
_TENSORRT_RTX = frozenset(
    {"tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx", "numpy", "onnx", "google", "tqdm"}
)
_TENSORRT = frozenset({"tensorrt", "torch", "numpy", "ml_dtypes", "onnx", "onnx_ir", "google", "tqdm"})

BRINGS: Mapping[str, frozenset[str]] = {  # names as they are imported; smaller extras first
    "chart": frozenset({"matplotlib"}),
    "client": _CLIENT,
    "tracing": frozenset({"opentelemetry"}),
    "export": _EXPORT,
    "serve": _SERVE,
    "quality": _QUALITY,
    "quantize": _EXPORT | _QUALITY,
    "tensorrt": _TENSORRT,
    "tensorrt-rtx": _TENSORRT_RTX,
    "train": _EXPORT | {"matplotlib", "peft"},
    "openvino": frozenset({"openvino"}),
    "learned": _QUALITY | {"lpips"},
    "all": _EXPORT | _QUALITY | {"matplotlib", "peft", "opentelemetry"},
}

NEEDS: Mapping[str, str] = {  # a command, or a room for its other commands; `kit` needs none
    "export": "export",
    "export engine": "tensorrt",
    "export layers": "tensorrt-rtx",
    "quantize": "quantize",
    "quantize gate": "quality",
    "serve": "serve",
    "serve generate": "client",
    "benchmarks": "all",
}


def extra_for(command: str, package: str) -> str | None:
    """Return the extra to install when a command such as "serve run" misses a package; None: no extra brings it."""
    own = NEEDS.get(command, NEEDS.get(command.split()[0]))
    if own is not None and package in BRINGS[own]:
        return own
    return next((extra for extra, packages in BRINGS.items() if package in packages), None)
