"""The tree of the kit's exceptions.

Flux2Error
├── UsageError        wrong use or bad input: exit code 2
│   ├── CheckpointError   a checkpoint that cannot be read as FLUX.2
│   └── RequestError      a request that breaks a rule; Triton: INVALID_ARGUMENT
├── CheckFailed       a check or a contract did not hold: exit code 1
│   └── ArtifactError     an artifact that does not verify
├── EngineError       a runtime failed while it ran a part: exit code 1; Triton: INTERNAL
├── UnavailableError  a server cannot take a request now; Triton: UNAVAILABLE
├── CancelledError    a request whose client has left; Triton: CANCELLED
└── ServerError       a server did not answer, or answered that it failed: exit code 1
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Flux2Error(Exception):
    """Base class of all errors that the kit raises deliberately; `exit_code` is returned by the command line."""

    exit_code = 1


class UsageError(Flux2Error):
    """The caller asked for something invalid; the message gives the value and what to do."""

    exit_code = 2


class CheckpointError(UsageError):
    """A checkpoint whose files cannot be read as a FLUX.2 model; the message names the file."""


class RequestError(UsageError):
    """A request that breaks a rule; the message names the field, its value and the rule. Triton: INVALID_ARGUMENT."""


class CheckFailed(Flux2Error):
    """A check or a quality contract failed; `facts` holds the measurements for `--json`."""

    def __init__(self, message: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.facts = facts or {}


class ArtifactError(CheckFailed):
    """An artifact whose manifest does not verify; the message names the file."""


class EngineError(Flux2Error):
    """A runtime failed while running a part: out of memory, or unsupported inputs."""


class UnavailableError(Flux2Error):
    """A request that cannot be served now but can be sent again; the message says when. Triton: UNAVAILABLE."""


class CancelledError(Flux2Error):
    """A request that nobody waits for any more. Triton: CANCELLED."""


class ServerError(Flux2Error):
    """A server did not answer, answered too late, or answered with an error."""
