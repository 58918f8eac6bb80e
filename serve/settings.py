"""What every model of a deployment needs to know, in one file beside its code."""

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

SETTINGS = "settings.json"
KnownAnswer = Literal["generate", "none"]  # of a deployment: generated when it is written, or not known


@dataclass(frozen=True)
class Tuning:
    """How a deployment uses its machine; the command line of `serve repository` reads its defaults here."""

    live_requests: int = option(8, "requests that share the denoiser's executions; more wait in the queue")
    max_rows: int = option(16, "rows of one transformer call")
    text_batch: int = option(8, "texts of one text encoder call")
    vae_batch: int = option(4, "images of one VAE call")
    queue_size: int = option(256, "requests that wait; one more is refused with UNAVAILABLE")
    threads: int = option(0, "threads of a CPU engine; 0: one per core")
    idle_seconds: int = option(300, "must exceed one denoising step, or Triton drops the request while it is denoised")


@dataclass(frozen=True)
class TensorRtModel:
    """How Triton runs a part of an engine artifact."""

    backend: Literal["tensorrt_plan", "python"]  # Triton's own; the kit's where weights are refitted or streamed
    profiles: int
    max_batch: int  # that every profile takes


@dataclass(frozen=True)
class Settings:
    """The part of a deployment's manifest that its models read when they load."""

    variant: Variant
    compute: Compute
    limits: Limits
    tuning: Tuning
    ports: dict[PartName, Ports] = field(default_factory=dict)
    tensorrt: dict[PartName, TensorRtModel] = field(default_factory=dict)  # empty: ONNX Runtime runs everything

    def write(self, folder: Path) -> None:
        (folder / SETTINGS).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Settings:
        """Read the settings that stand in a model's version folder; unknown keys are errors."""
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
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: cannot be read ({error}); write the deployment again") from None


def version_folder(args: dict[str, str]) -> Path:
    """Return the version folder of a Triton python model from the arguments of `initialize`."""
    return Path(args["model_repository"]) / args["model_version"]
