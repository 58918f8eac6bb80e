"""What is checked, and what Triton must be told, before a deployment is started."""

from __future__ import annotations

from pathlib import Path

from planner.shared_memory import Traffic, problem, shared_bytes
from runtimes.trt.record import RECORD, read_record
from serve.settings import Settings


def memory_problem(deployment: Path, free: int | None) -> str | None:
    """Return why shared memory is too small for requests at the limits of a deployment; None if it is enough."""
    settings = Settings.read(deployment / "tokenizer" / "1")
    limits, tuning = settings.limits, settings.tuning
    native = {part for part, model in settings.tensorrt.items() if model.backend == "tensorrt_plan"}
    traffic = Traffic(tuning.text_batch, tuning.vae_batch, limits.max_images, limits.max_pixels)
    needed = shared_bytes(
        settings.variant, settings.compute, traffic, "text_encoder" not in native, "vae_decoder" not in native
    )
    return problem(free, needed)


def tensorrt_options(deployment: Path) -> list[str]:
    """Return the options that Triton's TensorRT backend needs for a deployment's plans."""
    path = deployment / "denoiser" / "1" / RECORD
    if path.is_file() and read_record(path).version == "compatible":
        return ["--backend-config=tensorrt,version-compatible=true"]
    return []
