"""The kit's exceptions, one tree.

Flux2Error
├── UsageError        wrong use or bad input: exit code 2
│   ├── CheckpointError   a checkpoint that cannot be read as FLUX.2
│   └── RequestError      a request that breaks a rule; Triton: INVALID_ARGUMENT
├── CheckFailed       a check or a contract did not hold: exit code 1
│   └── ArtifactError     an artifact that does not verify
├── EngineError       a runtime failed while it ran a part: exit code 1; Triton: INTERNAL
└── ServerError       a server did not answer, or answered that it failed: exit code 1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Flux2Error(Exception):
    """Base of everything the kit raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(Flux2Error):
    """The caller asked for something that cannot be; the message says which value and what to do."""

    exit_code = 2


class CheckpointError(UsageError):
    """A checkpoint whose files cannot be read as a FLUX.2 model; the message names the file."""


class RequestError(UsageError):
    """A request that breaks a rule; the message names the field, its value and the rule. Triton: INVALID_ARGUMENT."""


class CheckFailed(Flux2Error):
    """A check or a quality contract did not hold; `facts` is what was measured, for `--json`."""

    def __init__(self, message: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.facts = facts or {}


class ArtifactError(CheckFailed):
    """An artifact whose manifest does not verify; the message names the file."""


class EngineError(Flux2Error):
    """A runtime failed while it ran a part: out of memory, or inputs it cannot take."""


class ServerError(Flux2Error):
    """A server did not answer in time or at all, or answered with an error of its own."""
