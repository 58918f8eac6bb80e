"""The sample's command line: exit codes, messages and one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.sample.__main__ import Progress, main
from kit.sample.draw import draw
from kit.sample.judge import read
from kit.sample.score import score, summary
from kit.sample.world import parse

PROMPT = "a red circle left of a blue square on a white background, with the word HELLO"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.png"
    Image.fromarray(draw(parse(PROMPT))).save(path)
    return path


def test_judge_says_what_it_sees_and_passes_the_right_image(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(image), "--prompt", PROMPT, "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["passed"]
    assert found["word"] == "HELLO"
    assert {thing["colour"] for thing in found["things"]} == {"red", "blue"}


def test_judge_fails_the_wrong_image(image: Path) -> None:
    assert main(["judge", str(image), "--prompt", PROMPT.replace("HELLO", "WORLD")]) == 1


def test_a_prompt_outside_the_grammar_is_bad_input(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["judge", str(image), "--prompt", "a cat"]) == 2
    assert "judge: not a sentence of the sample's grammar: 'a cat'" in capsys.readouterr().err


def test_a_missing_checkpoint_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--sample", str(tmp_path), "--out", str(tmp_path / "out.json")]) == 2
    assert "holds no checkpoint (model_index.json is missing); train one first" in capsys.readouterr().err


def test_wrong_use_exits_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: argument COMMAND: invalid choice: ")
    assert json.loads(captured.out)["exit_code"] == 2


def test_a_pipe_gets_plain_lines_of_progress(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    progress("vae", 1, 2, 0.5)
    progress("vae", 2, 2, 0.25)
    assert capsys.readouterr().err.splitlines()[-1].split() == ["vae", "2/2", "loss", "0.2500", "0", "s", "left"]


def test_scores_add_up_to_shares() -> None:
    scene = parse(PROMPT)
    right = score(scene, read(draw(scene)))
    wrong = score(scene, read(draw(parse("a green heart on a black background"))))
    found = summary([scene, scene], [right, wrong])
    assert found == {
        "images": 2,
        "things": 4,
        "shapes": 0.5,
        "colours": 0.5,
        "sizes": found["sizes"],
        "counts": 0.5,
        "positions": 0.5,
        "backgrounds": 0.5,
        "words_asked": 2,
        "words": 0.5,
        "no_word_where_none_was_asked": 1.0,
    }
