"""Deployments that differ in the policy of the denoiser only, to be measured in one run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kit.artifact import read_manifest, write_manifest
from kit.errors import UsageError
from pipeline.scheduling import Policy
from serve.settings import Settings
from serve.wire import DENOISER

POLICIES: Mapping[str, Policy] = {"steps": "fair", "requests": "whole-request", "one": "one-at-a-time"}
LINKED = (".safetensors", ".onnx", ".plan", ".pt2")  # what may be large is linked


def policy_names(text: str) -> list[str]:
    """Parse names separated by commas; raises UsageError for an unknown one."""
    names = [name for name in text.split(",") if name]
    if unknown := [name for name in names if name not in POLICIES]:
        raise UsageError(f"--policies {unknown[0]}: there are: {', '.join(POLICIES)}")
    if not names:
        raise UsageError(f"--policies: name some of {', '.join(POLICIES)}")
    return names


def with_policy(deployment: Path, policy: Policy, folder: Path) -> Path:
    """Return a deployment with another policy, made in `folder` from links; the deployment itself if it has it."""
    version = Path(DENOISER) / "1"
    settings = Settings.read(deployment / version)
    if settings.tuning.policy == policy:
        return deployment
    made = folder / policy

    def link(source: str, target: str) -> None:
        if Path(source).suffix in LINKED:
            try:
                os.link(source, target)
                return
            except OSError:  # another file system
                pass
        shutil.copy2(source, target)

    shutil.copytree(deployment, made, copy_function=link)
    replace(settings, tuning=replace(settings.tuning, policy=policy)).write(made / version)
    write_manifest(made, read_manifest(made))
    return made
