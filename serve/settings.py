"""The settings that every model of a deployment reads from a file next to its code."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from kit.artifact import ports_from_json, variant_from_json
from kit.cli import option
from kit.dtypes import Compute
from kit.errors import ArtifactError
from kit.ports import PartName, Ports
from kit.variants import Variant
from pipeline.request import Limits
from pipeline.scheduling import Policy

SETTINGS = "settings.json"
KnownAnswer = Literal["generate", "none"]  # whether the known answer is generated when the deployment is written
TritonRelease = Literal["24.10", "26.11"]  # a Triton between them loads the configuration of 24.10


MOST_LIVE = 30  # Triton's python backend runs 32 requests of one model to others at a time


@dataclass(frozen=True)
class Tuning:
    """How a deployment uses its machine; the defaults of `serve repository`."""

    live_requests: int = option(16, f"requests that are worked on at a time, at most {MOST_LIVE}; more wait")
    max_rows: int = option(16, "maximum rows of a transformer call")
    text_batch: int = option(8, "maximum texts of a text encoder call")
    vae_batch: int = option(4, "maximum images of a VAE call")
    queue_size: int = option(256, "requests that wait; further ones are rejected with UNAVAILABLE")
    queue_bytes: int = option(2**29, "bytes of the fields of all requests in flight; reference images are large")
    cache_bytes: int = option(
        2**30, "bytes of what requests share: prompt embeddings, latents, klein-kv's keys and values; 0: no cache"
    )
    threads: int = option(0, "threads of a CPU engine; 0: one per core")
    policy: Policy = option(  # noqa: RUF009 -- a dataclass field, as above
        "fair", "which requests the denoiser advances; the others are for comparisons (`benchmarks serving`)"
    )
    max_seconds: int = option(3600, "seconds after which a request is given up")
    triton: TritonRelease = option(  # noqa: RUF009 -- a dataclass field, as above
        "24.10", "oldest Triton release that loads the deployment; 26.11: ensembles have a limit of their own too"
    )


OrtRuntime = Literal["ort-cpu", "ort-cuda", "ort-tensorrt", "ort-tensorrt-rtx"]  # ONNX Runtime, by its provider
GraphChoice = Literal[OrtRuntime, "openvino-fp32", "openvino-bf16"]  # OpenVINO with the type in which it multiplies
Runtime = Literal[GraphChoice, "tensorrt", "aoti"]  # of graphs, of plans, and of packages of AOTInductor


@dataclass(frozen=True)
class TensorRtModel:
    """How Triton runs one part of an engine artifact."""

    backend: Literal["tensorrt_plan", "python"]  # python: the kit's model, for plans that Triton cannot load
    profiles: int
    max_batch: int  # the largest batch that every profile accepts


@dataclass(frozen=True)
class Settings:
    """The settings of a deployment that its models read when they load."""

    variant: Variant
    compute: Compute
    limits: Limits
    tuning: Tuning
    ports: dict[PartName, Ports] = field(default_factory=dict)
    tensorrt: dict[PartName, TensorRtModel] = field(default_factory=dict)  # only of the runtime tensorrt
    runtime: Runtime = "ort-cpu"
    gpu: bool = False  # whether the parts run on the GPU
    recipe: str = "fp32"
    checkpoint: str = ""  # digest of the artifact's manifest: what its weights and precision are

    @property
    def takes_references(self) -> bool:
        return "vae_encoder" in self.ports

    def write(self, folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Read the settings from a model's version folder; unknown keys are errors."""
        path = folder / SETTINGS
        try:
            raw: dict[str, Any] = json.loads(path.read_text())
            return cls(
                variant=variant_from_json(raw.pop("variant")),
                compute=raw.pop("compute"),
                limits=Limits(**raw.pop("limits")),
                tuning=Tuning(**raw.pop("tuning")),
                ports={name: ports_from_json(value) for name, value in raw.pop("ports").items()},
                tensorrt={name: TensorRtModel(**value) for name, value in raw.pop("tensorrt").items()},
                **raw,
            )
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path}: cannot be read ({error}); write the deployment again") from None


def version_folder(args: dict[str, str]) -> Path:
    """Return the version folder of a Triton python model from the arguments of `initialize`."""
    return Path(args["model_repository"]) / args["model_version"]
