"""Which requests share the next engine call: least remaining work first, and nobody below a guaranteed share.

A step cannot be interrupted, so a decision is made before each engine call. Serving the request with the least
remaining work keeps short requests short beside long ones. Long ones still advance: every eighth call (PATIENCE)
belongs to the request that is furthest behind 1/(N * PATIENCE) of the engine's time, while N requests are live. So a
request that needs c seconds alone is denoised within about N * PATIENCE * c seconds, whatever else arrives.

Requests with rows of the same shape may share a call. On a GPU with small images a shared call is almost as fast as
a single one; on a CPU it takes nearly as long as the calls one by one. Which of the two is the case is measured, and a
call that saves little is kept short, because a request that arrives has to wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

Policy = Literal["fair", "first-come", "whole-request", "one-at-a-time"]
PATIENCE = 8
PEER = 2.0  # requests with at most twice the remaining work share a call whenever that saves time
WORTH = 0.92  # a row is added if it then takes at most this share of its time in a call of its own
SAVING = 0.7  # a call may be of any length if its rows take at most this share of their time alone
SHORT = 4.0  # other calls take at most so many times the time of the leader alone
STRETCH = 1.15  # longer requests may join if the call then takes at most so much longer
RIDE = 0.75  # and where a row takes at most this share of its time alone,
RIDE_STRETCH = 1.75  # up to so many times the time of the leader alone, and more when many requests are live
EVEN = 1.08  # a wider call is not worth its length if the rows of a narrower one take so many times as long at most
WIDER = 50  # but every so many calls one is made that is a request wider: the machine may have changed
BATCH_WEIGHT = 4  # an interactive request counts as much as so many batch requests
CACHED_SHARE = 1 / 8  # of a token's cost, if only its keys and values are read (klein-9b: 85 beside 75 TFLOP)
SHAPES = 256  # whose costs are remembered; references may have any size

Shape = tuple[int, int]  # tokens of a row, references included; and tokens of cached references that it attends to


def size_of(shape: Shape) -> float:
    """Return the tokens that cost as much as a row of this shape."""
    tokens, cached = shape
    return tokens + CACHED_SHARE * cached


class Job(Protocol):
    """What the scheduler has to know of a request."""

    @property
    def shape(self) -> Shape: ...  # of a row: requests of one call have the same
    @property
    def rows(self) -> int: ...  # rows of an engine call
    @property
    def steps_left(self) -> int: ...
    @property
    def batch(self) -> bool: ...  # of the lower of the two priorities


@dataclass
class CallCosts:
    """Seconds of an engine call by the shape of its rows and their number, learned from the calls so far."""

    memory: float = 0.8  # weight of the past
    seen: dict[Shape, dict[int, float]] = field(default_factory=dict)  # shape -> rows -> seconds, latest last

    def observe(self, shape: Shape, rows: int, seconds: float) -> None:
        known = self.seen.pop(shape, {})
        if len(self.seen) >= SHAPES:
            self.seen.pop(next(iter(self.seen)))
        self.seen[shape] = known
        known[rows] = seconds if rows not in known else self.memory * known[rows] + (1 - self.memory) * seconds

    def seconds(self, shape: Shape, rows: int) -> float:
        """Predict a call; proportional to the nearest known one where nothing better is known."""
        if not self.seen:
            return size_of(shape) * rows  # any unit will do: only ratios matter until the first call
        near = shape if shape in self.seen else min(self.seen, key=lambda known: abs(size_of(known) - size_of(shape)))
        known, scale = self.seen[near], size_of(shape) / size_of(near)
        if rows in known:
            return known[rows] * scale
        below = max((r for r in known if r < rows), default=None)
        above = min((r for r in known if r > rows), default=None)
        if below is not None and above is not None:
            part = (rows - below) / (above - below)
            return (known[below] * (1 - part) + known[above] * part) * scale
        edge = below if below is not None else above
        assert edge is not None
        nearer = max((r for r in known if r < edge), default=None)
        if below is not None and nearer is not None:  # continue the line through the two widest calls
            slope = max((known[edge] - known[nearer]) / (edge - nearer), 0.0)
            return (known[edge] + slope * (rows - edge)) * scale
        return known[edge] * rows / edge * scale

    def best_width(self, shape: Shape, most: int) -> int:
        """Return the fewest rows with which a row takes about as little time as it ever does; at most `most`."""
        known = {rows: seconds / rows for rows, seconds in self.seen.get(shape, {}).items() if rows <= most}
        if len(known) < 2:
            return most
        least = min(known.values())
        return min(rows for rows, seconds in known.items() if seconds <= EVEN * least)


@dataclass
class _Account:
    """The engine time that a request has had, and that it was entitled to when it arrived."""

    entitled_before: float
    received: float = 0.0


@dataclass
class Scheduler:
    """Chooses the jobs of each engine call; `max_rows` limits the rows of one.

    The other policies are there to be compared with. "first-come" advances the oldest job and all that fit beside it,
    whatever it costs. "whole-request" does so too, but nobody joins until all that started together are done, as when
    a server batches requests and not steps. "one-at-a-time" advances the oldest job alone.
    """

    max_rows: int
    policy: Policy = "fair"
    costs: CallCosts = field(default_factory=CallCosts)
    _accounts: dict[int, _Account] = field(default_factory=dict)  # by id of the job
    _together: set[int] = field(default_factory=set)  # ids of the jobs that started together, of "whole-request"
    _calls: int = 0
    _turn: int = 0  # calls since the last one that a debt decided
    _entitled: float = 0.0  # seconds that a job of weight one, live since the start, was entitled to

    def choose(self, jobs: Sequence[Job]) -> list[int]:
        """Return the positions of the jobs that run next; their rows have one shape and fit one call."""
        for job in jobs:
            self._accounts.setdefault(id(job), _Account(self._entitled))
        if self.policy != "fair":
            return self._in_order(jobs)
        leader = self._leader(jobs)
        chosen, rows = [leader], jobs[leader].rows
        lead, lead_work = jobs[leader], self.work(jobs[leader])
        alone = self.costs.seconds(lead.shape, lead.rows)
        self._calls += 1
        again = self._calls % WIDER == 0
        best = self.costs.best_width(lead.shape, self.max_rows)
        explored = False
        others = (i for i, job in enumerate(jobs) if i != leader and job.shape == lead.shape)
        for i in sorted(others, key=lambda i: (jobs[i].batch, self.work(jobs[i]))):
            job, wider = jobs[i], rows + jobs[i].rows
            known = self.costs.seen.get(job.shape, {})
            if wider > self.max_rows or (explored and wider not in known):  # one new width a call
                continue
            if wider > best and wider in known and not again:
                continue
            peer = self.work(job) <= PEER * lead_work and job.batch <= lead.batch
            once_more = again and rows <= best
            if (
                len(known) < 2
                or once_more
                or self._is_worth_it(job, rows, alone, peer, max(RIDE_STRETCH, len(jobs) / 2))
            ):
                chosen.append(i)
                rows, explored = wider, wider not in known
        return chosen

    def _is_worth_it(self, job: Job, rows: int, alone: float, peer: bool, most: float) -> bool:
        """Return whether a job may join a call of so many rows, whose leader takes `alone` seconds alone."""
        own = self.costs.seconds(job.shape, job.rows)
        shared = self.costs.seconds(job.shape, rows + job.rows)
        added = (shared - self.costs.seconds(job.shape, rows)) / own
        stretch = shared / alone
        if stretch <= STRETCH or (added <= RIDE and stretch <= most):
            return True
        cheap = shared <= SAVING * own * (rows + job.rows) / job.rows
        return peer and added <= WORTH and (cheap or stretch <= SHORT)

    def _in_order(self, jobs: Sequence[Job]) -> list[int]:
        """Choose by a policy that knows no costs; jobs are in order of arrival."""
        if self.policy == "one-at-a-time":
            return [0]
        if self.policy == "first-come":
            return self._oldest(jobs)
        if not self._together:
            self._together = {id(jobs[i]) for i in self._oldest(jobs)}
        return [i for i, job in enumerate(jobs) if id(job) in self._together]

    def _oldest(self, jobs: Sequence[Job]) -> list[int]:
        chosen, rows = [0], jobs[0].rows
        for i, job in enumerate(jobs[1:], start=1):
            if job.shape == jobs[0].shape and rows + job.rows <= self.max_rows:
                chosen.append(i)
                rows += job.rows
        return chosen

    def ran(self, jobs: Sequence[Job], chosen: Sequence[int], seconds: float) -> None:
        """Account for the call that was made for the chosen of the live jobs."""
        rows = sum(jobs[i].rows for i in chosen)
        self.costs.observe(jobs[chosen[0]].shape, rows, seconds)
        self._entitled += seconds / sum(map(_weight, jobs))
        for i in chosen:
            # a shared call gives each job what it would have taken alone
            self._accounts[id(jobs[i])].received += max(
                seconds * jobs[i].rows / rows, min(seconds, self.costs.seconds(jobs[i].shape, jobs[i].rows))
            )

    def forget(self, job: Job) -> None:
        """Drop the account of a job that has ended."""
        self._accounts.pop(id(job), None)
        self._together.discard(id(job))

    def work(self, job: Job) -> float:
        """Return the seconds that the rest of a job needs alone."""
        return job.steps_left * self.costs.seconds(job.shape, job.rows)

    def _leader(self, jobs: Sequence[Job]) -> int:
        owed = [self._owed(job) for job in jobs]
        most = max(range(len(jobs)), key=owed.__getitem__)
        self._turn += 1
        if owed[most] > 0 and self._turn >= PATIENCE:  # debts are paid back little by little
            self._turn = 0
            return most
        return min(range(len(jobs)), key=lambda i: (jobs[i].batch, self.work(jobs[i]), i))

    def _owed(self, job: Job) -> float:
        """Return the seconds that a job is behind its guaranteed share."""
        account = self._accounts[id(job)]
        entitled = (self._entitled - account.entitled_before) * _weight(job) / PATIENCE
        return entitled - account.received


def _weight(job: Job) -> float:
    return 1 / BATCH_WEIGHT if job.batch else 1.0
