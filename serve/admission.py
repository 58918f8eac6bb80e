"""Which requests a server takes, and in which order it works on them; one admission for all models behind it.

Three bounds hold always: so many requests are worked on, so many wait, and the fields of all have so many bytes.
Waiting requests hold their fields only, no embeddings. Under sustained overload, when requests arrive faster than they
are completed for several seconds, waiting serves nobody: the queue would stay full and every image would be late. Then
only so many are admitted as finish in about twice the time of a single one, and the others are rejected at once, with
the time after which to try again. A burst, or clients that wait for their images, never causes this.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from kit.errors import UnavailableError
from kit.variants import Variant
from pipeline.edit_fields import reference_tokens
from pipeline.inpainting import steps_skipped
from pipeline.request import Request
from pipeline.scheduling import size_of

OVERLOAD = 1.5  # arrivals per completion that are too many
CALM = 1.2  # and that end an overload
BUCKETS = 3  # consecutive periods with too many arrivals
BUCKET_SECONDS = 0.5  # length of a period; longer where requests take longer
SLOWDOWN = 2.0  # of accepted requests under overload
AGING = 8.0  # a request that has waited so many times its own seconds goes first
ALIKE = 4.0  # seconds are proportional to costs that differ by at most this factor
SAMPLES = 32


def cost_of(request: Request, variant: Variant) -> float:
    """Return the cost of a request in tokens that the transformer computes: tokens x rows x steps."""
    pixels = variant.pixels_per_token
    image = (request.width // pixels) * (request.height // pixels)
    references = reference_tokens(request.images)
    rows = request.num_images * (2 if variant.guidance == "cfg" and request.guidance > 1 else 1)
    steps = request.steps - (steps_skipped(request.steps, request.strength) if request.mask is not None else 0)
    if variant.family == "klein-kv":  # computes references once
        return size_of((image, references)) * rows * steps + references
    return float((image + references) * rows * steps)


@dataclass(eq=False)
class Entry:
    """A request in flight."""

    cost: float  # tokens x rows x steps
    batch: bool = False  # the lower of the two priorities
    deadline: float | None = None  # seconds of the clock
    payload: Any = None
    bytes: int = 0  # of its fields
    arrived: float = 0.0
    alone: bool = False  # whether nothing else was in flight while it was
    bucket: list[int] = field(default_factory=lambda: [0, 0])  # the arrivals that it was counted with


@dataclass
class Admission:
    """Counts and orders the requests in flight; not thread-safe."""

    live_limit: int
    waiting_limit: int
    clock: Callable[[], float] = time.monotonic
    bytes_limit: int = 2**29
    waiting: list[Entry] = field(default_factory=list)
    live: list[Entry] = field(default_factory=list)
    overloaded: bool = False
    _completed: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=SAMPLES))  # busy time, cost
    _lone: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=SAMPLES))  # cost, seconds
    _busy: float = 0.0  # seconds with requests in flight
    _changed: float = 0.0  # when `_busy` was last advanced
    _buckets: deque[list[int]] = field(default_factory=lambda: deque([[0, 0]], maxlen=BUCKETS + 1))
    _bucket_start: float = 0.0

    @property
    def in_flight(self) -> int:
        return len(self.waiting) + len(self.live)

    @property
    def bytes(self) -> int:
        """Return the bytes of the fields of all requests in flight."""
        return sum(entry.bytes for entry in (*self.waiting, *self.live))

    def offer(self, entry: Entry) -> None:
        """Admit a request to the queue.

        Raises UnavailableError, which says when to try again, if the bounds, the load or its own deadline forbid it.
        """
        now = self._tick()
        entry.bucket = self._buckets[-1]
        entry.bucket[0] += 1
        self._observe_overload()
        entry.arrived = now
        if self.in_flight >= self.limit:
            raise UnavailableError(self.why_full())
        if self.in_flight and (held := self.bytes) + entry.bytes > self.bytes_limit:
            raise UnavailableError(
                f"the requests in flight have {held} bytes and this one has {entry.bytes}, the limit is "
                f"{self.bytes_limit}; try again in {max(self.retry_seconds(), 0.1):.1f} s"
            )
        if entry.deadline is not None and self._is_like_others(entry):
            late = now + self._predict(entry) - entry.deadline
            if late > 0:
                left = entry.deadline - now
                raise UnavailableError(
                    f"the deadline in {max(left, 0):.1f} s cannot be met: the image is expected in {left + late:.1f} s"
                )
        entry.alone = not self.in_flight
        for other in (*self.waiting, *self.live):
            other.alone = False
        self.waiting.append(entry)

    def shed(self) -> list[Entry]:
        """Remove and return the waiting requests that an overload leaves no time for; they are to be rejected."""
        if not self.overloaded:
            return []
        room = max(self._window() - len(self.live), 0)
        beyond, self.waiting = self.waiting[room:], self.waiting[:room]
        return beyond

    @property
    def limit(self) -> int:
        """How many requests may be in flight now."""
        bound = self.live_limit + self.waiting_limit
        return min(bound, self._window()) if self.overloaded else bound

    def why_full(self) -> str:
        return (
            f"{self.in_flight} requests are in flight, the limit is {self.limit}; "
            f"try again in {max(self.retry_seconds(), 0.1):.1f} s"
        )

    def retry_seconds(self) -> float:
        """Predict after how many seconds half of the requests in flight will be completed."""
        rate = self._rate()
        return sum(entry.cost for entry in (*self.waiting, *self.live)) / rate / 2 if rate else 1.0

    def take(self) -> Entry | None:
        """Move the next waiting request to the live ones; None if there is none or too many are live."""
        if not self.waiting or len(self.live) >= self.live_limit:
            return None
        now = self._tick()
        due = [entry for entry in self.waiting if now - entry.arrived > max(1.0, AGING * self._seconds(entry))]
        entry = due[0] if due else min(self.waiting, key=lambda e: (e.batch, e.cost, e.arrived))
        self.waiting.remove(entry)
        self.live.append(entry)
        return entry

    def drop(self, entry: Entry, left: bool = False) -> None:
        """Remove a request that was not completed: cancelled, rejected or failed.

        One that its client has `left` is no sign of overload: nobody waits for it.
        """
        self._tick()
        entry.bucket[0] -= left
        if entry in self.live:
            self.live.remove(entry)
        elif entry in self.waiting:
            self.waiting.remove(entry)

    def complete(self, entry: Entry) -> None:
        """Remove a request whose image was made."""
        now = self._tick()
        self.live.remove(entry)
        self._buckets[-1][1] += 1
        self._completed.append((self._busy, entry.cost))
        if entry.alone:
            self._lone.append((entry.cost, now - entry.arrived))

    def expired(self) -> list[Entry]:
        """Return the requests in flight whose deadline has passed."""
        now = self.clock()
        return [e for e in (*self.waiting, *self.live) if e.deadline is not None and now > e.deadline]

    def _tick(self) -> float:
        now = self.clock()
        if self.in_flight:
            self._busy += now - self._changed
        self._changed = now
        length = self._bucket_seconds()
        if now - self._bucket_start > length * (BUCKETS + 1):  # idle for long
            self._buckets.clear()
        while now - self._bucket_start > length or not self._buckets:
            self._buckets.append([0, 0])
            self._bucket_start = max(self._bucket_start + length, now - length)
        return now

    def _bucket_seconds(self) -> float:
        if len(self._completed) < 2:
            return BUCKET_SECONDS
        span = self._completed[-1][0] - self._completed[0][0]
        return max(BUCKET_SECONDS, 4 * span / (len(self._completed) - 1))

    def _observe_overload(self) -> None:
        """Find out whether the server is overloaded."""
        done = list(islice(self._buckets, 0, len(self._buckets) - 1))
        if not self.overloaded:
            many = [arrived > OVERLOAD * completed + 2 for arrived, completed in done]
            self.overloaded = len(done) == BUCKETS and all(many) and bool(self._completed)
        elif not done or (done[-1][0] <= CALM * done[-1][1] + 1):
            self.overloaded = False

    def _window(self) -> int:
        """Return how many requests in flight are completed in about `SLOWDOWN` times the seconds of a single one."""
        rate = self._rate()
        if not rate or not self._completed:
            return self.live_limit
        mean = sum(cost for _, cost in self._completed) / len(self._completed)
        return max(1, min(self.live_limit, int(SLOWDOWN * self._lone_seconds(mean) * rate / mean)))

    def _rate(self) -> float:
        """Return the cost that is completed per second while requests are in flight; 0 when unknown."""
        if len(self._completed) < 2:
            return 0.0
        span = self._completed[-1][0] - self._completed[0][0]
        return sum(cost for _, cost in islice(self._completed, 1, None)) / span if span > 0 else 0.0

    def _lone_seconds(self, cost: float) -> float:
        """Predict the seconds of a request without others."""
        near = [(c, s) for c, s in self._lone if c / ALIKE <= cost <= c * ALIKE] or self._lone
        if near:
            return cost * sum(s for _, s in near) / sum(c for c, _ in near)
        rate = self._rate()
        return cost / rate if rate else 0.0

    def _is_like_others(self, entry: Entry) -> bool:
        """Return whether requests of about its cost were seen alone: small images say nothing of large ones."""
        return any(cost / ALIKE <= entry.cost <= cost * ALIKE for cost, _ in self._lone)

    def _seconds(self, entry: Entry) -> float:
        return self._lone_seconds(entry.cost)

    def _predict(self, entry: Entry) -> float:
        """Predict the seconds until a request would be completed, with those that go before it."""
        rate = self._rate()
        before = [e for e in self.waiting if (e.batch, e.cost) <= (entry.batch, entry.cost)]
        before += [e for e in self.live if e.cost <= entry.cost]
        ahead = sum(e.cost for e in before) / rate if rate else 0.0
        return ahead + self._lone_seconds(entry.cost)
