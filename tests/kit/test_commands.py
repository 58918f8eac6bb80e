"""One table of commands, the same from `flux2 ROOM COMMAND` and `python -m ROOM COMMAND`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from kit import __version__, commands
from kit.commands import ROOMS, flux2

ROOT = Path(__file__).parents[2]
COMMANDS = [(room, name) for room in ROOMS for name in ROOMS[room].commands]


def exit_code(*argv: str) -> int:
    """Run as the console script does: --help and --version of argparse exit by themselves."""
    try:
        return flux2(argv)
    except SystemExit as left:
        return int(left.code or 0)


def parser_of(room: str, name: str) -> argparse.ArgumentParser:
    top = commands.parser(room, [name], room)
    rooms = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction))
    found: argparse.ArgumentParser = rooms.choices[name]
    return found


def test_the_console_script_is_this_function() -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"flux2": f"{flux2.__module__}:{flux2.__name__}"}


@pytest.mark.parametrize("argv", [("--version",), ("kit", "--version"), ("benchmarks", "--version")])
def test_every_room_says_the_version(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(*argv) == 0
    assert capsys.readouterr().out == f"flux2-deploy {__version__}\n"


def test_help_lists_every_room_with_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--help") == 0
    words = " ".join(capsys.readouterr().out.split())
    for room in ROOMS.values():
        assert f"{room.about}: {', '.join(room.commands)}" in words


@pytest.mark.parametrize("room", ROOMS)
def test_help_of_a_room_says_what_each_command_does(room: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(room, "--help") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert words.startswith(f"usage: flux2 {room} ")
    for name, (_, about) in ROOMS[room].commands.items():
        assert f" {name} {about}" in words


@pytest.mark.parametrize(("room", "name"), COMMANDS)
def test_help_of_a_command_says_what_it_does(room: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(room, name, "--help") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert words.startswith(f"usage: flux2 {room} {name} ")
    does = parser_of(room, name).description
    assert does
    assert " ".join(does.split()) in words
    assert "--json" in words


@pytest.mark.parametrize(("room", "name"), COMMANDS)
def test_every_option_has_a_help_text(room: str, name: str) -> None:
    silent = [action.option_strings or action.dest for action in parser_of(room, name)._actions if not action.help]
    assert silent == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "the following arguments are required: ROOM; see flux2 --help"),
        (("paint",), "argument ROOM: invalid choice: 'paint' (choose from 'kit', 'export', 'quantize', 'serve', "),
        (("kit",), "the following arguments are required: COMMAND; see flux2 kit --help"),
        (("kit", "guess"), "argument COMMAND: invalid choice: 'guess' (choose from 'doctor', 'plan'); see flux2 kit"),
        (("kit", "plan", "--gpu"), "argument --gpu: expected one argument; see flux2 kit plan --help"),
        (("kit", "doctor", ""), "argument DIR: the value is empty; see flux2 kit doctor --help"),
        (("kit", "plan", "--variant", "", "--gpu", "l4"), "argument --variant: the value is empty; see flux2 kit plan"),
        (("export", "onnx", "sample", "--out", ""), "argument --out: the value is empty; see flux2 export onnx --help"),
        (("kit", "doctor", "--fast"), "unrecognized arguments: --fast; see flux2 kit doctor --help"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    argv: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*argv) == 2
    captured = capsys.readouterr()
    plain = captured.err.replace("'", "")  # from 3.12 on argparse quotes no choices
    assert plain.startswith(f"error: {said}".replace("'", ""))
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert exit_code(*argv, "--json") == 2
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert facts == {"error": captured.err.removeprefix("error: ").strip(), "exit_code": 2}


def test_the_console_script_and_the_module_print_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["plan", "--variant", "klein-4b", "--gpu", "l4", "--json"]
    assert flux2(["kit", *argv]) == 0
    shown = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "kit", *argv], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    assert done.stdout == shown


@pytest.mark.parametrize(("room", "name"), COMMANDS)
def test_the_table_names_modules_that_are_commands(room: str, name: str) -> None:
    module = import_module(ROOMS[room].commands[name][0])
    assert callable(module.add_arguments)
    assert callable(module.run)


@pytest.mark.parametrize(("room", "name"), COMMANDS)
def test_help_of_every_option_says_its_default(room: str, name: str) -> None:
    parser = parser_of(room, name)
    formatter = parser._get_formatter()
    silent = [
        action.option_strings
        for action in parser._actions
        if action.option_strings
        and action.nargs != 0
        and not action.required
        and action.help != argparse.SUPPRESS
        and "default" not in formatter._expand_help(action)
    ]
    assert silent == []


@pytest.mark.parametrize(("room", "name"), COMMANDS)
def test_every_option_with_a_value_names_it(room: str, name: str) -> None:
    bare = [
        action.option_strings
        for action in parser_of(room, name)._actions
        if action.option_strings and action.nargs != 0 and not action.choices and not action.metavar
    ]
    assert bare == []


@pytest.mark.parametrize("argv", [("--help",), ("kit", "plan", "--help"), ("--version",), ("kit", "doctor", "--json")])
def test_a_reader_that_leaves_early_sees_no_complaint(argv: tuple[str, ...]) -> None:
    code = f"import sys; from kit.commands import flux2; sys.exit(flux2({list(argv)!r}))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) in (0, 141)  # argparse itself ignores an unbuffered pipe that is broken


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("kit", "plan", "--variant", "dev", "--gpu", "l4", "--js") == 2
    assert "unrecognized arguments: --js" in capsys.readouterr().err


def test_the_benchmarks_that_are_no_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("benchmarks", "--help") == 0
    said = capsys.readouterr().out
    programs = {
        path.stem for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()
    }
    programs |= {"sample"}
    for name in programs - {"__main__"}:
        assert f"benchmarks.{name}" in said
