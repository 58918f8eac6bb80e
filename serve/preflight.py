"""What is checked, and what Triton must be told, before a deployment is started."""

from __future__ import annotations

from pathlib import Path

from planner.shared_memory import Traffic, problem, shared_bytes
from runtimes.trt.record import RECORD, read_record
from serve import tracing
from serve.client import Client
from serve.settings import Settings
from serve.tcp_ports import TcpPorts


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


def triton_options(
    deployment: Path, ports: TcpPorts, secret: str, exit_timeout: int, shm_prefix: str, otlp: str = ""
) -> list[str]:
    """Return the options of tritonserver; `secret` restricts the repository API to whoever knows it."""
    return [
        "--model-control-mode=explicit",
        "--load-model=*",
        f"--grpc-restricted-protocol=model-repository:{Client.SECRET}={secret}",
        f"--http-restricted-api=model-repository:{Client.SECRET}={secret}",
        "--model-load-thread-count=8",
        *(f"--{p}-address={ports.host}" for p in ("http", "grpc", "metrics")),
        *(f"--{p}-port={getattr(ports, p)}" for p in ("http", "grpc", "metrics")),
        f"--exit-timeout-secs={exit_timeout}",
        "--disable-auto-complete-config",
        "--log-info=false",
        f"--backend-config=python,shm-region-prefix-name={shm_prefix}",
        "--backend-config=python,stub-timeout-seconds=600",
        *tensorrt_options(deployment),
        *(tracing.triton_options(otlp) if otlp else ()),
    ]
