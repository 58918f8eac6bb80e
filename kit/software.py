"""Which packages are installed, from their metadata and files; imports nothing heavy."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from kit.compilers import COMPILERS
from kit.providers import PROVIDERS as ROWS

EXPORT = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "safetensors")
TENSORRT = COMPILERS["tensorrt"].packages
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
SERVER = "nvidia-pytriton"
OTHERS = ("torchao", "tritonclient", "numpy")
# A provider is available if its library is in the package; the CPU provider is built in.
PROVIDERS: Mapping[str, str] = {
    "TensorrtExecutionProvider": "libonnxruntime_providers_tensorrt.so",
    "CUDAExecutionProvider": "libonnxruntime_providers_cuda.so",
    "OpenVINOExecutionProvider": "libonnxruntime_providers_openvino.so",
}


def versions() -> dict[str, str]:
    """Return the versions of the installed packages that the kit can use."""
    found = {}
    for name in (*EXPORT, *TENSORRT, *RUNTIMES, SERVER, *OTHERS):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def providers() -> tuple[str, ...]:
    """Return the execution providers of ONNX Runtime whose libraries are installed, in its order of preference."""
    spec = importlib.util.find_spec("onnxruntime")
    if spec is None or spec.origin is None:
        return ()
    folder = Path(spec.origin).parent / "capi"
    built_in = (name for name, library in PROVIDERS.items() if (folder / library).is_file())
    plugins = (row.title for row in ROWS.values() if row.plugin and importlib.util.find_spec(row.plugin) is not None)
    return (*built_in, *plugins, "CPUExecutionProvider")


def tritonserver(installed: Mapping[str, str]) -> str | None:
    """Return where tritonserver would come from: PATH, or the package that contains one; None if there is none."""
    on_path = shutil.which("tritonserver")
    if on_path:
        return on_path
    return f"of {SERVER} {installed[SERVER]}" if SERVER in installed else None


def tensorrt(installed: Mapping[str, str]) -> str | None:
    """Return the name and version of the TensorRT wheel; None if there is none."""
    return next((f"{name} {installed[name]}" for name in TENSORRT if name in installed), None)
