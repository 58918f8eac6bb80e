"""Simulate how long images take under load: Poisson arrivals at k replicas that share a GPU among their requests.

The denoiser advances requests step by step, those with the least remaining work first, and as many of them together as
gain from it (pipeline/scheduling.py). So a replica is a limited-processor-sharing queue (Zhang, Dai, Zwart, "Diffusion
limits of limited processor sharing queues", Ann. Appl. Probab. 21 (2011) 745-799): the requests that are ahead share
it, and the others wait. How many share it is the fewest with which it is about as fast as it ever is. Where batching
gains nothing that is one, and the queue is one of shortest remaining work first (Schrage, "A proof of the optimality of
the shortest remaining processing time discipline", Oper. Res. 16 (1968) 687-690); among equal requests, that is first
come, first served. There is no closed form for the 95th percentile in between, so the queue is simulated with a fixed
seed and therefore the same arrivals every time.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

REQUESTS = 20_000
WARM_UP = 1_000  # the first requests meet an empty queue and are not counted
SEED = 20261125
MOST_SIMULATED = 16  # replicas; more of them share the requests a little better still
EVEN = 1.08  # more requests do not share a replica if its throughput is within this factor of the best


@dataclass(frozen=True)
class Waiting:
    """Seconds from the arrival of a request to its image."""

    mean: float
    p50: float
    p95: float
    p99: float
    load: float  # share of time that a replica is busy at full batches


def simulate(
    per_second: float, gains: Sequence[float], seconds: float, replicas: int = 1, step: float = 0.0
) -> Waiting | None:
    """Return the waiting times at a load, or None if the replicas cannot keep up.

    `seconds` is the time of one image alone, `step` that of one of its steps, which nothing interrupts. `gains[n - 1]`
    is the throughput of a replica with n requests in its batch, relative to one (1.0 if batching gains nothing).
    """
    load = per_second * seconds / (replicas * best_gain(gains))
    if load >= 1:
        return None
    if replicas > MOST_SIMULATED:  # a share of them with its share of the requests: at most a little slower
        per_second, replicas = per_second * MOST_SIMULATED / replicas, MOST_SIMULATED
    chance, clock = random.Random(SEED), 0.0
    arrivals = []
    for _ in range(REQUESTS):
        clock += chance.expovariate(per_second)
        arrivals.append((clock, seconds))
    sojourns = sorted(replay(arrivals, gains, replicas, step)[WARM_UP:])
    count = len(sojourns)
    return Waiting(
        mean=sum(sojourns) / count,
        p50=sojourns[count // 2],
        p95=sojourns[int(count * 0.95)],
        p99=sojourns[int(count * 0.99)],
        load=load,
    )


def replay(
    arrivals: Iterable[tuple[float, float]], gains: Sequence[float], replicas: int = 1, step: float = 0.0
) -> list[float]:
    """Return how long each request is in the queue; arrivals are (second, seconds alone) in order of time.

    One that could start at once begins with the next step, up to `step` seconds later, longer for a wider batch.
    """
    sharing = gains[: slots(gains)]
    servers = [_Replica(sharing) for _ in range(replicas)]
    ends, loads = [math.inf] * replicas, [0] * replicas  # next completion, and live and waiting requests
    chance = random.Random(SEED)
    ended: dict[int, float] = {}
    began = []  # the arrival, moved back by what is left of the running step
    for number, (clock, seconds) in enumerate(arrivals):
        for index, end in enumerate(ends):
            if end <= clock:
                ended.update(servers[index].advance(clock))
                ends[index], loads[index] = servers[index].next_end(), servers[index].load
        index = loads.index(min(loads))
        ended.update(servers[index].advance(clock))
        running = len(servers[index].live)
        rest = chance.random() * step * running / sharing[running - 1] if running else 0.0
        starts = servers[index].arrive(number, seconds)
        began.append(clock - rest if starts else clock)
        ends[index], loads[index] = servers[index].next_end(), servers[index].load
    for server in servers:
        ended.update(server.advance(math.inf))
    return [ended[number] - clock for number, clock in enumerate(began)]


def slots(gains: Sequence[float]) -> int:
    """Return how many requests share a replica: the fewest with about the highest throughput."""
    return next(count for count, gain in enumerate(gains, start=1) if gain * EVEN >= max(gains))


def best_gain(gains: Sequence[float]) -> float:
    """Return the throughput of a busy replica, relative to one request alone."""
    return gains[slots(gains) - 1]


@dataclass
class _Replica:
    """One replica in virtual time; `progress` is the work that a request live since the start would have received."""

    gains: Sequence[float]
    progress: float = 0.0
    clock: float = 0.0
    live: list[tuple[float, int]] = field(default_factory=list)  # (progress at completion, request), a heap
    queue: list[tuple[float, int]] = field(default_factory=list)  # (remaining work, request), a heap

    @property
    def load(self) -> int:
        """Return the number of its requests, live or waiting."""
        return len(self.live) + len(self.queue)

    def next_end(self) -> float:
        """Return when the next request finishes if none arrives before."""
        if not self.live:
            return math.inf
        return self.clock + (self.live[0][0] - self.progress) / self._speed()

    def arrive(self, request: int, work: float) -> bool:
        """Accept a request at the time up to which `advance` was just called; returns whether it starts at once."""
        heapq.heappush(self.live, (self.progress + work, request))
        if len(self.live) <= len(self.gains):
            return True
        longest = max(self.live)  # waits; of equal ones, the latest
        self.live.remove(longest)
        heapq.heapify(self.live)
        heapq.heappush(self.queue, (longest[0] - self.progress, longest[1]))
        return longest[1] != request

    def advance(self, until: float) -> list[tuple[int, float]]:
        """Advance to a time; returns (request, end) of those that finished."""
        done = []
        while self.live:
            end = self.next_end()
            if end > until:
                self.progress += (until - self.clock) * self._speed()
                break
            self.progress, request = heapq.heappop(self.live)
            self.clock = end
            done.append((request, end))
            if self.queue:
                work, waited = heapq.heappop(self.queue)
                heapq.heappush(self.live, (self.progress + work, waited))
        self.clock = until
        return done

    def _speed(self) -> float:
        """Return the work that each live request receives per second."""
        return self.gains[len(self.live) - 1] / len(self.live)
