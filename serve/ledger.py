"""Shared memory between the processes of one server: which requests are in flight, which are cancelled, what died.

The processes of a Triton server share nothing but requests. This file, mapped by each of them, is the side channel:
the front model gives every request a slot and a ticket, the denoiser reads cancellations and writes progress, the
supervisor announces that it heals or drains. Every field has a single writer at a time and is at most eight bytes, so
no lock is needed.
"""

from __future__ import annotations

import logging
import mmap
import os
import secrets
import tempfile
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from kit.atomic_file import write_file

logger = logging.getLogger(__name__)
VARIABLE = "FLUX2_LEDGER"  # the file; set by `serve run`
SLOTS = 2048
REFUSED = 64
_HEADER = np.dtype(
    [
        ("state", "u8"),
        ("heals", "u8"),
        ("served", "u8"),
        ("denoisers", "u8"),  # how many denoiser processes were started or lost
        ("next_refused", "u8"),
        ("step_picoseconds", "u8"),  # of one row and token in the latest engine calls
        ("refused", "u8", (REFUSED,)),
    ]
)
_SLOT = np.dtype(
    [
        ("ticket", "u8"),  # 0: free
        ("digest", "u8"),
        ("cancelled", "u1"),
        ("denoised", "u1"),
        ("dispatched", "u1"),
        ("preview", "u1"),
        ("batch", "u1"),
        ("tag", "u8"),  # by which flux2_stream finds the request it follows
        ("steps", "u4"),
        ("step", "u4"),
    ],
    align=True,
)
SIZE = _HEADER.itemsize + SLOTS * _SLOT.itemsize


class State(IntEnum):
    """What the supervisor does."""

    SERVING = 0
    HEALING = 1
    DRAINING = 2


def ledger_path() -> Path:
    """Return the file of this server: from the environment, or by the process of tritonserver in its container."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else Path(tempfile.gettempdir()) / f"flux2-{os.getppid()}.ledger"


class Ledger:
    """The mapped file; zeros are a valid ledger without requests, so any process may create it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, SIZE)
            self._map = mmap.mmap(descriptor, SIZE)
        finally:
            os.close(descriptor)
        self._header: Any = np.frombuffer(self._map, _HEADER, 1)
        self._slots: Any = np.frombuffer(self._map, _SLOT, SLOTS, _HEADER.itemsize)

    # the supervisor

    @property
    def state(self) -> State:
        return State(int(self._header["state"][0]))

    @state.setter
    def state(self, value: State) -> None:
        self._header["state"] = value

    @property
    def heals(self) -> int:
        """How often a model or the server was restarted."""
        return int(self._header["heals"][0])

    def count_heal(self) -> None:
        self._header["heals"] += 1

    @property
    def served(self) -> int:
        """How many requests were answered with images."""
        return int(self._header["served"][0])

    def refuse(self, digest: int) -> None:
        """Put a request that ended a process twice on the list of those that are rejected."""
        index = int(self._header["next_refused"][0])
        self._header["refused"][0, index % REFUSED] = digest
        self._header["next_refused"] = index + 1

    def is_refused(self, digest: int) -> bool:
        return bool((self._header["refused"][0] == digest).any())

    def in_flight(self) -> set[int]:
        """Return the digests of the requests that models work on."""
        busy = (self._slots["ticket"] != 0) & (self._slots["dispatched"] == 1)
        return {int(digest) for digest in self._slots["digest"][busy]}

    def fingerprint(self) -> int:
        """Return a number that changes when a request comes, advances or goes."""
        return hash(self._slots["ticket"].tobytes() + self._slots["step"].tobytes())

    @property
    def occupied(self) -> int:
        """How many requests are in flight, waiting ones included."""
        return int((self._slots["ticket"] != 0).sum())

    # the front model

    def clear(self) -> None:
        """Free all slots: the requests of a front model that has ended are nobody's."""
        self._slots["ticket"] = 0

    def open(self, digest: int, batch: bool = False, tag: int = 0) -> int:
        """Take a free slot; returns its ticket, a positive number that no caller can guess."""
        index = int(np.argmin(self._slots["ticket"] != 0))
        if self._slots["ticket"][index]:
            raise RuntimeError(f"all {SLOTS} slots of the ledger are taken")
        ticket = (secrets.randbits(50) + 1) * SLOTS + index
        slot = self._slots[index]
        slot["digest"] = digest
        slot["cancelled"] = slot["denoised"] = slot["dispatched"] = slot["preview"] = 0
        slot["step"] = slot["steps"] = 0
        slot["batch"], slot["tag"] = batch, tag
        slot["ticket"] = ticket
        return ticket

    def count_served(self) -> None:
        self._header["served"] += 1

    def dispatch(self, ticket: int) -> None:
        self._slots["dispatched"][ticket % SLOTS] = 1

    def cancel(self, ticket: int) -> None:
        if self.is_open(ticket):
            self._slots["cancelled"][ticket % SLOTS] = 1

    def close(self, ticket: int) -> None:
        if self.is_open(ticket):
            self._slots["ticket"][ticket % SLOTS] = 0

    # the models behind it and beside it

    def find(self, tag: int) -> int:
        """Return the ticket of the request with a tag; 0 if there is none."""
        (found,) = np.nonzero((self._slots["tag"] == tag) & (self._slots["ticket"] != 0))
        return int(self._slots["ticket"][found[0]]) if len(found) else 0

    def is_batch(self, ticket: int) -> bool:
        return bool(self._slots["batch"][ticket % SLOTS])

    def is_open(self, ticket: int) -> bool:
        return ticket > 0 and int(self._slots["ticket"][ticket % SLOTS]) == ticket

    def is_wanted(self, ticket: int) -> bool:
        """Return whether someone still waits for the request."""
        return self.is_open(ticket) and not self._slots["cancelled"][ticket % SLOTS]

    @property
    def denoisers(self) -> int:
        """A number that changes when the denoiser's process is lost or started: what it worked on is then lost."""
        return int(self._header["denoisers"][0])

    def count_denoiser(self) -> None:
        self._header["denoisers"] += 1

    def finish(self, ticket: int) -> None:
        """Record that the denoiser has an answer for a request."""
        if self.is_open(ticket):
            self._slots["denoised"][ticket % SLOTS] = 1

    def is_denoised(self, ticket: int) -> bool:
        return bool(self._slots["denoised"][ticket % SLOTS])

    def advance(self, ticket: int, step: int, steps: int) -> None:
        """Record how many of its steps a request has completed."""
        if self.is_open(ticket):
            self._slots["steps"][ticket % SLOTS] = steps
            self._slots["step"][ticket % SLOTS] = step

    def progress(self, ticket: int) -> tuple[int, int]:
        """Return the completed steps of a request and all of them; zeros before it is denoised."""
        slot = self._slots[ticket % SLOTS]
        return int(slot["step"]), int(slot["steps"])

    def want_preview(self, ticket: int) -> None:
        self._slots["preview"][ticket % SLOTS] = 1

    def wants_preview(self, ticket: int) -> bool:
        return self.is_open(ticket) and bool(self._slots["preview"][ticket % SLOTS])

    def write_preview(self, ticket: int, image: bytes) -> None:
        """Store the latest preview of a request, an encoded image; one that cannot be stored is left out."""
        path = self._preview_path(ticket)
        try:
            write_file(path, image)
        except OSError as error:
            logger.warning("a preview could not be written: %s", error)

    def read_preview(self, ticket: int) -> bytes | None:
        """Return the latest preview of a request, an encoded image; None if there is none."""
        try:
            return self._preview_path(ticket).read_bytes()
        except OSError:
            return None

    def drop_preview(self, ticket: int) -> None:
        self._preview_path(ticket).unlink(missing_ok=True)

    def _preview_path(self, ticket: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{ticket}.png")

    @property
    def step_seconds(self) -> float:
        """Seconds of one row and token in the latest engine calls; 0 before the first."""
        return float(self._header["step_picoseconds"][0]) * 1e-12

    @step_seconds.setter
    def step_seconds(self, value: float) -> None:
        self._header["step_picoseconds"] = int(value * 1e12)
