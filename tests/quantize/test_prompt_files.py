"""Prompts are read by the kind of their file; nothing that is not a prompt becomes one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit.errors import UsageError
from quantize.prompt_set import load

RED, BLUE = "a red circle", "a blue square, and a line"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", f"{RED}\n\n{BLUE}\n"),
        ("a.TXT", f"\ufeff{RED}\r\n\r\n  {BLUE}\r\n"),
        ("a.jsonl", f"{json.dumps({'prompt': RED, 'id': 3})}\n{json.dumps({'caption': BLUE})}\n"),
        ("a.jsonl", f"\ufeff{json.dumps(RED)}\r\n{json.dumps(BLUE)}"),
        ("a.json", json.dumps([RED, {"prompt": BLUE, "seed": 1}])),
        ("a.json", "\ufeff" + json.dumps([{"caption": RED}, {"caption": BLUE}])),
        ("a.csv", f'prompt,seed\n{RED},1\n"{BLUE}",2\n'),
        ("a.csv", f'\ufefffile,caption\r\n1.png,{RED}\r\n2.png,"{BLUE}"\r\n'),
        ("a.tsv", f"caption\tfile\n{RED}\tx\n{BLUE}\ty\n"),
    ],
)
def test_prompts_are_read_from_files_of_every_kind(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert [prompt.text for prompt in load(str(tmp_path / name)).prompts] == [RED, BLUE]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", '{"prompt": "x"}\n', r"a.txt, line 1: is a JSON object and not a prompt; name the file .jsonl"),
        ("a.jsonl", '{"text": "x"}', r"a.jsonl, line 1: has no key prompt or caption; it has: 'text'"),
        ("a.jsonl", '{"prompt": "x"}\nhello', r"a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"prompt": 3}', r"line 1: 3 is not a prompt"),
        ("a.jsonl", '{"prompt": " "}', r"line 1: ' ' is not a prompt"),
        ("a.json", "[[1]]", r"a.json, entry 1: \[1\] is not a prompt"),
        ("a.json", '{"prompts": []}', "expected a list of prompts or"),
        ("a.csv", "text,seed\nx,1\n", "a.csv: has no column prompt or caption; its first line has: 'text, seed'"),
        ("a.csv", "prompt\nx, y\n", "line 2: has more values than columns; put prompts with commas in quotes"),
        ("a.csv", 'prompt\n"x\n', "not valid CSV"),
        ("a.csv", "seed,prompt\n1\n", "line 2: None is not a prompt"),
        ("a.csv", "", "has no column prompt or caption"),
        ("a.yaml", "- x", "prompts are read from .txt, .jsonl, .json, .csv, .tsv files"),
        ("a.parquet", "PAR1", "prompts are read from"),
        ("prompts", "x", "a file of one prompt per line is named .txt"),
        ("a.txt", b"\xff\xfea\x00", "byte 0 is not valid UTF-8"),
        ("a.txt", "\ufeff\n", "contains no prompts"),
    ],
)
def test_the_rest_is_refused(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=message):
        load(str(tmp_path / name))
