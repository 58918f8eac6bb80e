"""Looking at the stubs of a server again and again: a dead one is noticed, and one that was started again is found."""

from __future__ import annotations

import pytest

from serve import processes
from serve.processes import Stub, StubWatch

SERVER = 7


class World:
    """Processes by pid, each with a state letter and the time it was born; counts the searches for children."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.found: dict[int, tuple[str, str, str]] = {}  # model, state, born
        self.searches = 0
        monkeypatch.setattr(processes, "stubs", self._stubs)
        monkeypatch.setattr(processes, "_stat", lambda pid: self.found.get(pid, ("", "X", ""))[1:])

    def _stubs(self, server: int) -> dict[str, Stub]:
        self.searches += 1
        alive = {pid: process for pid, process in self.found.items() if process[1] not in processes.DEAD}
        return {model: Stub(model, pid, state, born) for pid, (model, state, born) in alive.items()}


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    made = World(monkeypatch)
    made.found = {11: ("flux2", "S", "1"), 12: ("denoiser", "R", "1")}
    return made


def test_living_models_are_searched_for_once(world: World) -> None:
    watch = StubWatch()
    for _ in range(5):
        assert {model: stub.pid for model, stub in watch.look(SERVER, ["flux2", "denoiser"]).items()} == {
            "flux2": 11,
            "denoiser": 12,
        }
    assert world.searches == 1
    world.found[12] = ("denoiser", "T", "1")
    assert watch.look(SERVER, ["flux2", "denoiser"])["denoiser"].state == "T"
    assert world.searches == 1


def test_a_dead_model_is_missing_until_it_has_a_process_again(world: World) -> None:
    watch, models = StubWatch(), ["flux2", "denoiser"]
    watch.look(SERVER, models)
    for state in ("Z", "X"):
        world.found[12] = ("denoiser", state, "1")
        assert set(watch.look(SERVER, models)) == {"flux2"}
    world.found[13] = ("denoiser", "S", "5")
    assert watch.look(SERVER, models)["denoiser"].pid == 13


def test_another_process_with_the_pid_of_a_dead_model_is_not_taken_for_it(world: World) -> None:
    watch, models = StubWatch(), ["flux2", "denoiser"]
    watch.look(SERVER, models)
    world.found[12] = ("", "R", "9")  # any process of this machine
    assert "denoiser" not in watch.look(SERVER, models)


def test_another_server_is_searched_again(world: World) -> None:
    watch = StubWatch()
    watch.look(SERVER, ["flux2"])
    world.found = {31: ("flux2", "S", "3")}
    assert watch.look(SERVER + 1, ["flux2"])["flux2"].pid == 31


def test_the_state_and_birth_of_a_process_are_those_of_linux() -> None:
    state, born = processes._stat(1)
    assert state in "SRDI"
    assert born.isdigit()
    assert processes.state_of(2**22 + 1) == "X"
