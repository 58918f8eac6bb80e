"""README and docs: commands exist and parse, links resolve, no table is there twice, generated parts are current.

Fences: ```bash is run by a test; ```bash gpu, long, download and usage are not run, but must parse.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks import generated_docs
from benchmarks.__main__ import _add_save
from kit import commands
from kit.commands import ROOMS
from kit.errors import CheckFailed

ROOT = Path(__file__).parent.parent
PAGES = generated_docs.pages(ROOT)
TEXTS = [*PAGES, ROOT / "kit/sample/README.md"]
MARKS = ("gpu", "long", "download", "usage")
RUN_WITH_README = {"make demo", "make test"}
SHELL = (
    "pip ",
    ". ",
    "optimum-cli ",
    "curl ",
    "python -c ",
    "echo ",
    "perf_analyzer ",
    "docker ",
)  # programs that are not the kit's
MOST_BYTES = 8192  # of README


@dataclass(frozen=True)
class Command:
    """One command line of a page, continuation lines joined; `mark` is empty where a test runs it."""

    page: str
    mark: str
    line: str

    def __str__(self) -> str:
        return f"{self.page}: {self.line}"


def commands_of(page: Path) -> Iterator[Command]:
    """Yield the command lines of a page's bash blocks."""
    for mark, block in re.findall(r"^```bash *(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\n +", " ", block).splitlines():
            if words := shlex.split(line, comments=True):
                yield Command(str(page.relative_to(ROOT)), mark, shlex.join(words) if mark != "usage" else line)


ALL = [command for page in PAGES for command in commands_of(page)]
README = [command.line for command in ALL if command.page == "README.md"]
CHEAP = [c for c in ALL if not c.mark and c.page != "README.md" and c.line not in README]


def parse(words: list[str]) -> argparse.ArgumentParser | None:
    """Return the parser of `python -m ROOM COMMAND` or `flux2 ROOM COMMAND`; None for a module of another kind."""
    room, *rest = words[1:] if words[0] == "flux2" else words[2:]
    if "." in room:
        assert importlib.util.find_spec(room) is not None, f"no module {room}"
        return None
    assert room in ROOMS, f"no room {room}"
    assert rest, "no command"
    assert rest[0] in ROOMS[room].commands, f"no command {rest[0]}"
    extend = _add_save if room == "benchmarks" else lambda parser: None
    return commands.parser(room, rest, f"python -m {room}", extend)


def options_of(parser: argparse.ArgumentParser, command: str) -> set[str]:
    """Return the option strings of a command."""
    (choices,) = (a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return set(choices[command]._option_string_actions)


def is_ours(words: list[str]) -> bool:
    return words[0] == "flux2" or words[:2] == ["python", "-m"]


@pytest.mark.parametrize("command", ALL, ids=str)
def test_every_command_exists_with_its_options(command: Command) -> None:
    assert command.mark in ("", *MARKS), f"unknown mark {command.mark!r}; there are: {', '.join(MARKS)}"
    words = command.line.replace("...", "").split() if command.mark == "usage" else shlex.split(command.line)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif not is_ours(words):
        assert command.line.startswith(SHELL), f"what is {words[0]}?"
    elif (parser := parse(words)) is not None:
        at = 1 if words[0] == "flux2" else 2
        if command.mark == "usage":
            found = re.findall(r"--[a-z][a-z0-9-]*", command.line)
            assert set(found) <= options_of(parser, words[at + 1])
        else:
            parser.parse_args(words[at + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_within_sentences_exist_with_their_options(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for line in re.findall(r"`(python -m [^`]+|flux2 [^`]+)`", text):
        words = line.replace("...", "").split()
        room = words[1] if words[0] == "flux2" else words[2]
        if len(words) < 3 or room.isupper():
            continue  # `python -m ROOM COMMAND`, `flux2` as such
        if (parser := parse(words)) is not None:
            command = words[2] if words[0] == "flux2" else words[3]
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options_of(parser, command)


def test_unmarked_commands_run(tmp_path: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    assert CHEAP
    for command in CHEAP:
        done = subprocess.run(
            shlex.split(command.line), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_every_command_of_the_kit_is_mentioned() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    missing = [f"{room} {name}" for room in ROOMS for name in ROOMS[room].commands if f"{room} {name}" not in text]
    assert missing == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_with_their_folder_exist(page: Path) -> None:
    found = re.findall(rf"(?:{'|'.join(ROOMS)}|planner|runtimes|pipeline|tests)/[\w/-]+\.\w+", page.read_text())
    assert [name for name in found if not (ROOT / name).is_file()] == []


def test_no_table_row_is_there_twice() -> None:
    seen: dict[str, str] = {}
    for page in TEXTS:
        for line in page.read_text().splitlines():
            if line.startswith("|") and not re.fullmatch(r"[|\s:-]+", line):
                row = re.sub(r"\s+", " ", line)
                if len(row) > 40:  # short rows, headers as a rule, may be alike
                    assert row not in seen, f"{page.name} and {seen[row]}: {row}"
                    seen[row] = page.name


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= MOST_BYTES


def test_generated_parts_are_current() -> None:
    stale = [page.name for page, text in generated_docs.current(ROOT).items() if text != page.read_text()]
    assert stale == [], "run python -m benchmarks.generated_docs"


def test_a_generated_part_that_is_not_known_is_named(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("<!-- generated: moon -->\n<!-- end -->\n")
    with pytest.raises(CheckFailed, match="unknown generated part 'moon'; there are: fields, limits"):
        generated_docs.current(tmp_path)


def test_a_stale_page_fails_the_check_and_is_written_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- generated: limits -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(generated_docs, "ROOT", tmp_path)
    assert generated_docs.main(["--check"]) == 1
    assert "stale: README.md; run python -m benchmarks.generated_docs" in capsys.readouterr().err
    assert generated_docs.main([]) == 0
    assert "`--min-side`" in page.read_text()
    assert page.read_text().startswith("before\n")
    assert generated_docs.main(["--check"]) == 0


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    missing = [page.name for page in PAGES if page.name != "README.md" and f"(docs/{page.name})" not in text]
    assert missing == []


@pytest.mark.parametrize(
    "line", ["python -m export fly DIR", "python -m fly onnx DIR", "flux2 kit", "python -m benchmarks.fly"]
)
def test_a_command_that_does_not_exist_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError, match=r"no (command|room|module)"):
        parse(line.split())
