"""Prompt sets: the kit's, the sample's and files, and which ones are rejected."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kit.errors import UsageError
from quantize.prompt_set import SCRIPTS, load


def written(folder: Path, prompts: Any, name: str = "mine.json") -> str:
    path = folder / name
    path.write_text(json.dumps({"format": 1, "prompts": prompts}))
    return str(path)


def test_the_kits_set_has_at_least_128_prompts_over_all_categories() -> None:
    counted = Counter(prompt.category for prompt in load("kit").prompts)
    assert counted.total() >= 128
    wanted = {"people", "hands", "materials", "typography", "lighting", "styles", "counting", "relations"}
    assert wanted <= counted.keys()
    assert min(counted[name] for name in wanted) >= 10


def test_every_typography_prompt_quotes_its_text_and_all_scripts_occur() -> None:
    typography = [prompt for prompt in load("kit").prompts if prompt.category == "typography"]
    assert {prompt.script for prompt in typography} == SCRIPTS.keys()
    assert all(f'"{prompt.reads}"' in prompt.text for prompt in typography)


def test_posters_have_several_texts_of_15_to_20_words_in_latin_cyrillic_cjk_and_arabic() -> None:
    posters = [prompt for prompt in load("kit").prompts if prompt.category == "posters"]
    assert {"latin", "cyrillic", "chinese", "japanese", "korean", "arabic"} <= {prompt.script for prompt in posters}
    for prompt in posters:
        elements = prompt.reads.splitlines()
        assert len(elements) >= 3
        assert all(f'"{element}"' in prompt.text for element in elements)
        spaced = prompt.script not in ("chinese", "japanese")  # these have no spaces: two characters a word
        assert 15 <= (len(prompt.reads.split()) if spaced else len(prompt.reads) / 2) <= 20


def test_a_part_of_the_kits_set_takes_one_prompt_of_each_category_in_turn() -> None:
    part = load("kit:28").prompts
    assert set(Counter(prompt.category for prompt in part).values()) == {2}
    assert set(part) < set(load("kit").prompts)


def test_the_samples_set_is_drawn_from_its_grammar_and_from_the_seed() -> None:
    from kit.sample.world import HELD_OUT_WORDS, parse

    first = load("sample:40")
    assert [parse(prompt.text).word for prompt in first.prompts] == [prompt.reads for prompt in first.prompts]
    assert {prompt.reads for prompt in first.prompts} <= {"", *HELD_OUT_WORDS}
    assert first.digest == load("sample:40").digest == load("sample:40:2026").digest
    assert first.digest != load("sample:40:7").digest
    assert first.prompts[:10] == load("sample:10").prompts


def test_a_set_without_some_prompts_names_how_many_and_is_unchanged_without_none() -> None:
    whole = load("sample:40")
    seen = {prompt.mark for prompt in load("sample:10").prompts}
    rest = whole.without(seen)
    assert (rest.spec, rest.prompts) == ("sample:40 without 10", whole.prompts[10:])
    assert rest.digest != whole.digest
    assert whole.without(()) is whole


def test_a_text_file_gives_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("a red boat\n\n  a blue door  \n")
    assert [prompt.text for prompt in load(str(path)).prompts] == ["a red boat", "a blue door"]


def test_the_digest_follows_the_prompts_and_not_the_file(tmp_path: Path) -> None:
    one = {"id": "a", "category": "x", "text": "a boat"}
    two = {"id": "a", "category": "x", "text": "a ship"}
    first, same = (load(written(tmp_path, [one], name)) for name in ("1.json", "2.json"))
    assert first.digest == same.digest != load(written(tmp_path, [two])).digest


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("kit:0", "'0' is not a positive number"),
        ("kit:few", "'few' is not a positive number"),
        ("kit:999", "the kit has 166 prompts"),
        ("sample", "give a number of prompts, as in sample:100"),
        ("sample:10001", "at most 10000"),
        ("nowhere.txt", "nowhere.txt: no such file, and not `kit`"),
    ],
)
def test_an_invalid_spec_is_rejected(spec: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        load(spec)


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([], "contains no prompts"),
        ("text", 'expected a list of prompts or {"format": 1'),
        (["a boat"], 'prompt 1: expected an object with string values, found "a boat"'),
        ([{"id": "a", "category": "x", "text": 3}], "prompt 1: expected an object with string values"),
        ([{"id": "a", "category": "x", "txt": "b"}], "unknown key 'txt'; there are: id, category, text"),
        ([{"id": "a", "category": "x"}], "prompt 1: text is missing or empty"),
        ([{"id": "a", "category": "x", "text": "  "}], "a has an empty text"),
        ([{"id": "a", "category": "x", "text": "b", "reads": " "}], "a has a text to read that is only spaces"),
        ([{"id": "a", "category": "x", "text": t} for t in "bc"], "the id 'a' occurs twice"),
        ([{"id": i, "category": "x", "text": "b"} for i in "ac"], "c repeats the text of a"),
        ([{"id": "a", "category": "x", "text": "b", "reads": "HI"}], "has 'HI' to read in the unknown script ''"),
    ],
)
def test_a_malformed_file_is_rejected(tmp_path: Path, prompts: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        load(written(tmp_path, prompts))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("p.json", b"{", "not valid JSON"),
        ("p.txt", b"a\xff", "byte 1 is not valid UTF-8"),
        ("p.txt", b" \n\n", "contains no prompts"),
    ],
)
def test_a_file_that_cannot_be_read_is_rejected(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=match):
        load(str(tmp_path / name))
