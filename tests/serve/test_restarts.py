"""When a server that dies again and again is given up, with a stand-in for the server."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.errors import CheckFailed
from serve.ledger import Ledger
from serve.supervise import RESTARTS, Supervisor


class Dying:
    """A server that has ended whenever it is looked at; each start generates the known answer."""

    probe_seconds = 0.1
    python_models: tuple[str, ...] = ()
    pid = 2**22  # no process has it

    def __init__(self, ledger: Ledger, between: Callable[[], object]) -> None:
        self.ledger, self.between, self.starts = ledger, between, 0

    def exit_code(self) -> int | None:
        if self.starts:
            self.between()
        return 1

    def restart(self) -> None:
        self.starts += 1
        self.ledger.count_served()

    def interrupt(self) -> None: ...
    def reload(self, model: str) -> None: ...
    def wait_until_ready(self) -> None: ...
    def probe_again(self) -> None: ...


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def watch(server: Dying, until: Callable[[Supervisor], bool]) -> Supervisor:
    supervisor = Supervisor(server, lambda event: None)  # type: ignore[arg-type]  # a list is not needed here
    deadline = time.monotonic() + 20
    while not until(supervisor) and time.monotonic() < deadline:
        time.sleep(0.01)
    supervisor.release()
    supervisor.finish()
    return supervisor


def test_a_server_that_serves_nobody_between_its_deaths_is_given_up(ledger: Ledger) -> None:
    server = Dying(ledger, between=int)
    supervisor = watch(server, lambda supervisor: supervisor.failed is not None)
    assert isinstance(supervisor.failed, CheckFailed)
    assert f"it was restarted {RESTARTS} times within a minute, which did not help" in str(supervisor.failed)
    assert server.starts == RESTARTS


def test_a_server_that_serves_clients_between_its_deaths_is_started_again(ledger: Ledger) -> None:
    server = Dying(ledger, between=ledger.count_served)
    supervisor = watch(server, lambda supervisor: server.starts > 2 * RESTARTS or supervisor.failed is not None)
    assert supervisor.failed is None
    assert server.starts > 2 * RESTARTS
