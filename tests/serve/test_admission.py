"""Bounds, order, deadlines and overload of the admission, with a clock of its own."""

from __future__ import annotations

import re

import pytest

from kit.errors import UnavailableError
from serve.admission import Admission, Entry


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Service:
    """An admission whose live requests are served one after the other, `rate` of cost 1 a second."""

    def __init__(self, live: int = 4, waiting: int = 100, rate: float = 20.0) -> None:
        self.clock = Clock()
        self.admission = Admission(live, waiting, self.clock)
        self.rate = rate
        self.left = 0.0
        self.seconds: list[float] = []
        self.refused: list[str] = []
        self.shed = 0
        self.most = 0

    def offer(self, cost: float = 1.0, batch: bool = False, deadline: float | None = None) -> Entry | None:
        entry = Entry(cost, batch, None if deadline is None else self.clock.now + deadline)
        try:
            self.admission.offer(entry)
        except UnavailableError as error:
            self.refused.append(str(error))
            return None
        self.most = max(self.most, self.admission.in_flight)
        return entry

    def run(self, seconds: float, arrivals: float = 0.0, closed: int = 0) -> None:
        """Let time pass with so many arrivals a second, or with so many clients that each wait for their image."""
        step = 0.005
        due, work = 0.0, 0.0
        for _ in range(round(seconds / step)):
            self.clock.now += step
            due += arrivals * step
            while due >= 1:
                due -= 1
                self.offer()
            while closed and self.admission.in_flight < closed:
                self.offer()
            self.shed += len(self.admission.shed())
            while self.admission.take() is not None:
                pass
            work = work + self.rate * step if self.admission.live else 0.0
            while self.admission.live and work >= self.admission.live[0].cost:
                entry = self.admission.live[0]
                work -= entry.cost
                self.seconds.append(self.clock.now - entry.arrived)
                self.admission.complete(entry)


def test_the_bounds_hold_and_the_refusal_says_when_to_try_again() -> None:
    service = Service(live=2, waiting=3)
    service.run(1, closed=1)
    for _ in range(9):
        service.offer()
    while service.admission.take() is not None:
        pass
    assert (len(service.admission.live), len(service.admission.waiting)) == (2, 3)
    assert len(service.refused) == 5
    assert service.refused[0].startswith("5 requests are in flight, the limit is 5; try again in 0.")


def test_a_burst_is_never_an_overload() -> None:
    service = Service()
    service.run(2, closed=1)
    for _ in range(90):
        service.offer()
    service.run(8)
    assert not service.refused
    assert service.shed == 0
    assert len(service.seconds) >= 90


def test_clients_that_wait_for_their_images_are_never_an_overload() -> None:
    service = Service()
    service.run(20, closed=64)
    assert not service.refused
    assert service.shed == 0


def test_under_overload_few_are_accepted_and_those_are_fast() -> None:
    """Ten times the rate for a minute: p95 of the accepted at most twice the lone seconds."""
    service = Service()
    service.run(3, closed=1)
    lone = sorted(service.seconds)[len(service.seconds) // 2]
    service.seconds.clear()
    service.run(60, arrivals=200)
    assert service.most <= 104
    assert len(service.seconds) > 0.9 * 60 * 20  # nothing is lost in throughput
    assert sorted(service.seconds)[int(0.95 * len(service.seconds))] <= 2 * lone + 0.01
    assert service.shed > 0


def test_an_overload_ends_with_its_cause() -> None:
    service = Service()
    service.run(2, closed=1)
    service.run(10, arrivals=200)
    assert service.admission.overloaded
    service.run(3, arrivals=10)
    assert not service.admission.overloaded


def test_slow_models_need_longer_to_tell_an_overload() -> None:
    """At an image in ten seconds, three arrivals in one second are a burst."""
    service = Service(rate=0.1)
    service.run(100, closed=1)
    for _ in range(6):
        service.offer()
    service.run(5)
    assert not service.refused
    assert not service.admission.overloaded


def test_a_deadline_that_cannot_be_met_is_refused_at_once() -> None:
    service = Service(live=1)
    service.run(2, closed=1)
    for _ in range(40):
        service.offer()
    assert service.offer(deadline=0.5) is None
    assert re.fullmatch(r"the deadline in 0.5 s cannot be met: the image is expected in [12].\d s", service.refused[0])
    assert service.offer(deadline=10) is not None
    service.clock.now += 11
    assert len(service.admission.expired()) == 1


def test_requests_unlike_all_before_are_not_refused_for_their_deadline() -> None:
    service = Service()
    service.run(2, closed=1)
    assert service.offer(cost=10_000, deadline=60) is not None


def test_small_requests_go_first_but_large_ones_do_not_wait_for_ever() -> None:
    service = Service(live=1)
    service.run(2, closed=1)
    while service.admission.in_flight:
        service.run(0.1)
    large = service.offer(cost=7)
    small = [service.offer() for _ in range(3)]
    assert service.admission.take() in small
    assert large in service.admission.waiting
    service.clock.now += 8 * 7 / 20 + 1
    service.admission.complete(service.admission.live[0])
    service.offer()
    assert service.admission.take() is large


def test_interactive_requests_go_before_batch_requests() -> None:
    service = Service(live=1)
    batch, interactive = service.offer(cost=1, batch=True), service.offer(cost=5)
    assert service.admission.take() is interactive
    assert service.admission.waiting == [batch]


@pytest.mark.parametrize("live", [False, True])
def test_dropped_requests_leave_room(live: bool) -> None:
    service = Service(live=1, waiting=0)
    entry = service.offer()
    assert entry is not None
    if live:
        service.admission.take()
    assert service.offer() is None
    service.admission.drop(entry)
    assert service.offer() is not None


@pytest.mark.parametrize("left", [True, False])
def test_requests_that_their_clients_left_are_no_overload(left: bool) -> None:
    service = Service()
    service.run(2, arrivals=10)
    for _ in range(20):
        for entry in [service.offer() for _ in range(20)]:
            if entry is not None:
                service.admission.drop(entry, left)
        service.run(0.2, arrivals=10)
    assert service.admission.overloaded is not left
