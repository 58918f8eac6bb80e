"""Load the prompt sets of calibration and of the quality gate, with a digest so that two runs can be compared.

Every command line names a set in the same way: `kit` is the set that ships with the kit, `kit:32` are 32 of its prompts
spread over the categories, `sample:100` (or `sample:100:7`, with another seed) are sentences of the sample's grammar,
and anything else is a file: text with one prompt per line, JSON lines, JSON, or a table (see prompt_files.py).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kit.errors import UsageError
from quantize.prompt_files import parse, read_prompts, read_text

FORMAT = 1
SAMPLE_SEED = 2026
# script of the text in an image -> Tesseract's name of a language that uses it
SCRIPTS = {
    "latin": "eng",
    "cyrillic": "rus",
    "greek": "ell",
    "chinese": "chi_sim",
    "japanese": "jpn",
    "korean": "kor",
    "arabic": "ara",
    "hebrew": "heb",
    "devanagari": "hin",
    "thai": "tha",
    "georgian": "kat",
}


@dataclass(frozen=True)
class Prompt:
    """One prompt; `reads` is the text that the image should show, "" for none."""

    id: str
    category: str
    text: str
    reads: str = ""
    script: str = ""

    @property
    def mark(self) -> str:
        """Return a short digest of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class PromptSet:
    """Prompts in order; `spec` is the name from the command line."""

    spec: str
    prompts: tuple[Prompt, ...]

    @property
    def digest(self) -> str:
        """Digest the content of the prompts, independent of the file they came from."""
        content = json.dumps([asdict(prompt) for prompt in self.prompts], ensure_ascii=False)
        return hashlib.sha256(content.encode()).hexdigest()

    def without(self, marks: Collection[str]) -> PromptSet:
        """Return the set without the prompts with these marks."""
        kept = tuple(prompt for prompt in self.prompts if prompt.mark not in marks)
        left_out = len(self.prompts) - len(kept)
        return PromptSet(f"{self.spec} without {left_out}", kept) if left_out else self


def load(spec: str) -> PromptSet:
    """Load a set by its name on the command line; raises UsageError that names the invalid prompt."""
    name, *numbers = spec.split(":")
    if name == "kit" and len(numbers) <= 1:
        shipped = _checked(_from_json(_shipped(), "the kit's prompts"), spec)
        return PromptSet(spec, _spread(shipped, _count(spec, numbers[0])) if numbers else shipped)
    if name == "sample" and 1 <= len(numbers) <= 2:
        seed = _count(spec, numbers[1]) if numbers[1:] else SAMPLE_SEED
        return PromptSet(spec, _checked(_scenes(spec, _count(spec, numbers[0]), seed), spec))
    if spec in ("sample", ""):
        raise UsageError(f"--prompts {spec!r}: give a number of prompts, as in sample:100, or `kit`, or a file")
    return PromptSet(spec, _checked(_from_file(Path(spec)), spec))


def _shipped() -> str:
    return (resources.files("quantize") / "data" / "prompts.json").read_text(encoding="utf-8")


def _count(spec: str, text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"--prompts {spec}: {text!r} is not a positive number")
    return int(text)


def _spread(prompts: Sequence[Prompt], count: int) -> tuple[Prompt, ...]:
    """Take `count` prompts, from each category in turn."""
    if count > len(prompts):
        raise UsageError(f"--prompts kit:{count}: the kit has {len(prompts)} prompts")
    categories: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        categories.setdefault(prompt.category, []).append(prompt)
    turns = (prompt for turn in zip_longest(*categories.values()) for prompt in turn if prompt)
    return tuple(prompt for prompt, _ in zip(turns, range(count), strict=False))


def _scenes(spec: str, count: int, seed: int) -> Iterator[Prompt]:
    """Draw distinct random scenes of the sample's grammar, with words that were held out from training."""
    if count > 10_000:
        raise UsageError(f"--prompts {spec}: at most 10000")
    from kit.sample.world import HELD_OUT_WORDS, Scene, random_scene

    rng, scenes = random.Random(seed), dict[Scene, None]()
    while len(scenes) < count:
        scenes[random_scene(rng, words=HELD_OUT_WORDS)] = None
    for number, scene in enumerate(scenes, start=1):
        category = ("one thing", "two things", "three things")[len(scene.things) - 1]
        yield Prompt(f"scene-{number:04d}", category, scene.prompt(), scene.word, "latin" if scene.word else "")


def _from_file(path: Path) -> Iterator[Prompt]:
    if not path.is_file():
        raise UsageError(f"--prompts {path}: no such file, and not `kit`, `kit:N` or `sample:N`")
    content = read_text(path)
    if path.suffix.lower() == ".json" and not content.lstrip().startswith("["):
        yield from _from_json(content, str(path))
        return
    for name, text in read_prompts(path, content):
        yield Prompt(name, "file", text)


def _from_json(content: str, where: str) -> Iterator[Prompt]:
    raw = parse(where, content)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT or not isinstance(raw.get("prompts"), list):
        raise UsageError(f'{where}: expected a list of prompts or {{"format": {FORMAT}, "prompts": [...]}}')
    for number, entry in enumerate(raw["prompts"], start=1):
        yield _prompt(entry, f"{where}, prompt {number}")


def _prompt(entry: Any, where: str) -> Prompt:
    if not isinstance(entry, dict) or not all(isinstance(value, str) for value in entry.values()):
        raise UsageError(
            f"{where}: expected an object with string values, found {json.dumps(entry, ensure_ascii=False)[:80]}"
        )
    known = Prompt.__dataclass_fields__
    unknown = next((key for key in entry if key not in known), None)
    if unknown is not None:
        raise UsageError(f"{where}: unknown key {unknown!r}; there are: {', '.join(known)}")
    missing = next((key for key in ("id", "category", "text") if not entry.get(key)), None)
    if missing is not None:
        raise UsageError(f"{where}: {missing} is missing or empty")
    return Prompt(**entry)


def _checked(prompts: Iterator[Prompt], spec: str) -> tuple[Prompt, ...]:
    """Reject an empty set, empty or repeated texts and ids, and a text to read without its script."""
    checked: list[Prompt] = []
    ids: set[str] = set()
    texts: dict[str, str] = {}
    for prompt in prompts:
        if not prompt.text.strip():
            raise UsageError(f"--prompts {spec}: {prompt.id} has an empty text")
        if prompt.reads and not prompt.reads.strip():
            raise UsageError(f"--prompts {spec}: {prompt.id} has a text to read that is only spaces")
        if prompt.id in ids:
            raise UsageError(f"--prompts {spec}: the id {prompt.id!r} occurs twice")
        if prompt.text in texts:
            raise UsageError(f"--prompts {spec}: {prompt.id} repeats the text of {texts[prompt.text]}")
        if prompt.reads and prompt.script not in SCRIPTS:
            raise UsageError(
                f"--prompts {spec}: {prompt.id} has {prompt.reads!r} to read in the unknown script {prompt.script!r}; "
                f"there are: {', '.join(SCRIPTS)}"
            )
        ids.add(prompt.id)
        texts[prompt.text] = prompt.id
        checked.append(prompt)
    if not checked:
        raise UsageError(f"--prompts {spec}: contains no prompts")
    return tuple(checked)
