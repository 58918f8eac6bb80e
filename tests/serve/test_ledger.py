"""The shared file of a server's processes: tickets, cancellations, progress, refused digests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from serve.ledger import REFUSED, SLOTS, Ledger, State, ledger_path


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")


def test_two_processes_see_the_same_requests(ledger: Ledger) -> None:
    ticket = ledger.open(digest=5)
    ledger.dispatch(ticket)
    code = (
        "import sys; from pathlib import Path; from serve.ledger import Ledger\n"
        f"other = Ledger(Path({str(ledger.path)!r}))\n"
        f"assert other.is_wanted({ticket}) and other.in_flight() == {{5}}\n"
        f"other.advance({ticket}, 3, 9); other.cancel({ticket})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert ledger.progress(ticket) == (3, 9)
    assert ledger.is_open(ticket)
    assert not ledger.is_wanted(ticket)


def test_a_closed_or_invented_ticket_is_nobody_s(ledger: Ledger) -> None:
    ticket = ledger.open(1)
    for invented in (0, -1, ticket + SLOTS, ticket + 1, 2**62):
        assert not ledger.is_open(invented)
    ledger.close(ticket)
    assert not ledger.is_open(ticket)
    ledger.advance(ticket, 1, 2)
    ledger.finish(ticket)
    ledger.cancel(ticket)
    again = ledger.open(2)
    assert again != ticket
    assert ledger.is_wanted(again)
    assert not ledger.is_denoised(again)
    assert ledger.progress(again) == (0, 0)


def test_slots_are_used_again_and_too_many_are_an_error(ledger: Ledger) -> None:
    tickets = [ledger.open(n) for n in range(SLOTS)]
    assert len({ticket % SLOTS for ticket in tickets}) == SLOTS
    with pytest.raises(RuntimeError, match="all 2048 slots of the ledger are taken"):
        ledger.open(0)
    ledger.close(tickets[7])
    assert ledger.open(0) % SLOTS == 7
    ledger.clear()
    assert ledger.occupied == 0


def test_the_list_of_refused_requests_forgets_the_oldest(ledger: Ledger) -> None:
    for digest in range(1, REFUSED + 2):
        ledger.refuse(digest)
    assert not ledger.is_refused(1)
    assert ledger.is_refused(2)
    assert ledger.is_refused(REFUSED + 1)


def test_a_follower_finds_a_request_by_its_tag(ledger: Ledger) -> None:
    ticket = ledger.open(1, batch=True, tag=77)
    assert ledger.find(77) == ticket
    assert ledger.is_batch(ticket)
    ledger.close(ticket)
    assert ledger.find(77) == 0


def test_every_change_of_a_request_changes_the_fingerprint(ledger: Ledger) -> None:
    seen = {ledger.fingerprint()}
    ticket = ledger.open(1)
    seen.add(ledger.fingerprint())
    ledger.advance(ticket, 1, 4)
    seen.add(ledger.fingerprint())
    ledger.close(ticket)
    seen.add(ledger.fingerprint())
    assert len(seen) == 4


def test_states_and_the_default_path(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ledger.state is State.SERVING
    ledger.state = State.DRAINING
    assert Ledger(ledger.path).state is State.DRAINING
    monkeypatch.delenv("FLUX2_LEDGER", raising=False)
    assert ledger_path().name.startswith("flux2-")
    monkeypatch.setenv("FLUX2_LEDGER", "/somewhere/ledger")
    assert ledger_path() == Path("/somewhere/ledger")
