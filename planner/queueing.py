"""Simulate how long images take under load: Poisson arrivals at k replicas that share a GPU among their requests.

The denoiser advances every live request by one step per execution, so a replica is a limited-processor-sharing queue
(Zhang, Dai, Zwart, "Diffusion limits of limited processor sharing queues", Ann. Appl. Probab. 21 (2011) 745-799): up to
`slots` requests share it and the others wait in order of arrival. With one slot it is first come, first served. With
many it is the M/G/1 processor-sharing queue, whose mean time is S / (1 - load) for any distribution of work (Kleinrock,
"Queueing Systems II", 1976, chapter 4). There is no closed form for the 95th percentile in between, so the queue is
simulated with a fixed seed and therefore the same arrivals every time.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

REQUESTS = 20_000
WARM_UP = 1_000  # the first requests meet an empty queue and are not counted
SEED = 20261125
MOST_SIMULATED = 16  # replicas; more of them share the requests a little better still


@dataclass(frozen=True)
class Waiting:
    """Seconds from the arrival of a request to its image."""

    mean: float
    p50: float
    p95: float
    p99: float
    load: float  # share of time that a replica is busy at full batches


def simulate(per_second: float, gains: Sequence[float], seconds: float, replicas: int = 1) -> Waiting | None:
    """Return the waiting times at a load, or None if the replicas cannot keep up.

    `seconds` is the time of one image alone. `gains[n - 1]` is the throughput of a replica with n requests in its
    batch, relative to one request (1.0 if batching gains nothing); the length of `gains` is the number of slots.
    """
    load = per_second * seconds / (replicas * max(gains))
    if load >= 1:
        return None
    if replicas > MOST_SIMULATED:  # a share of them with its share of the requests: at most a little slower
        per_second, replicas = per_second * MOST_SIMULATED / replicas, MOST_SIMULATED
    arrivals, servers = random.Random(SEED), [_Replica(gains) for _ in range(replicas)]
    times: list[tuple[float, float]] = []
    ends, loads = [math.inf] * replicas, [0] * replicas  # next completion, and live and waiting requests
    clock = 0.0
    for _ in range(REQUESTS):
        clock += arrivals.expovariate(per_second)
        for index, end in enumerate(ends):
            if end <= clock:
                times += servers[index].advance(clock)
                ends[index], loads[index] = servers[index].next_end(), servers[index].load
        index = loads.index(min(loads))
        servers[index].advance(clock)
        servers[index].arrive(clock, seconds)
        ends[index], loads[index] = servers[index].next_end(), servers[index].load
    for server in servers:
        times += server.advance(math.inf)
    sojourns = sorted(done - arrived for arrived, done in sorted(times)[WARM_UP:])
    count = len(sojourns)
    return Waiting(
        mean=sum(sojourns) / count,
        p50=sojourns[count // 2],
        p95=sojourns[int(count * 0.95)],
        p99=sojourns[int(count * 0.99)],
        load=load,
    )


@dataclass
class _Replica:
    """One replica in virtual time; `progress` is the work that a request live since the start would have received."""

    gains: Sequence[float]
    progress: float = 0.0
    clock: float = 0.0
    live: list[tuple[float, float]] = field(default_factory=list)  # (progress at completion, arrival), a heap
    queue: deque[tuple[float, float]] = field(default_factory=deque)  # (arrival, work)

    @property
    def busy(self) -> int:
        return len(self.live)

    @property
    def load(self) -> int:
        """Return the number of its requests, live or waiting."""
        return len(self.live) + len(self.queue)

    def next_end(self) -> float:
        """Return when the next request finishes if none arrives before."""
        if not self.live:
            return math.inf
        return self.clock + (self.live[0][0] - self.progress) * self.busy / self.gains[self.busy - 1]

    def arrive(self, now: float, work: float) -> None:
        """Accept a request at the time up to which `advance` was just called."""
        if self.busy < len(self.gains):
            heapq.heappush(self.live, (self.progress + work, now))
        else:
            self.queue.append((now, work))

    def advance(self, until: float) -> list[tuple[float, float]]:
        """Advance to a time; returns (arrival, end) of the requests that finished."""
        done = []
        while self.live:
            speed = self.gains[self.busy - 1] / self.busy  # of each live request
            end = self.clock + (self.live[0][0] - self.progress) / speed
            if end > until:
                self.progress += (until - self.clock) * speed
                break
            self.progress, arrived = heapq.heappop(self.live)
            self.clock = end
            done.append((arrived, end))
            if self.queue:
                waited, work = self.queue.popleft()
                heapq.heappush(self.live, (self.progress + work, waited))
        self.clock = until
        return done
