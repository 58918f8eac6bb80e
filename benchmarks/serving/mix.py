"""The mix of requests that a load consists of: classes with shares and fields, from a JSON file or the default one."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import UsageError

PROMPT = "a red circle left of a blue square on a white background"
DEFAULT: Mapping[str, Any] = {
    "short": {"share": 4, "fields": {"prompt": PROMPT, "steps": 4, "width": 128, "height": 128}},
    "long": {"share": 1, "fields": {"prompt": PROMPT, "steps": 28, "width": 128, "height": 128}},
    "large": {"share": 1, "fields": {"prompt": PROMPT, "steps": 4, "width": 192, "height": 192}},
}
SEEDS = 8  # per class: each has a serial twin, with which images under load are compared


@dataclass(frozen=True)
class RequestClass:
    """Requests that are alike: what they ask for, and how many of all they are, by their share."""

    name: str
    share: float
    fields: Mapping[str, Any]

    @property
    def images(self) -> int:
        return int(self.fields.get("num_images") or 1)

    def request(self, number: int) -> dict[str, Any]:
        """Return the fields of one request; the seeds repeat, so that every image has a twin."""
        return {**self.fields, "seed": number % SEEDS}


def read_mix(path: Path | None) -> list[RequestClass]:
    """Read a mix: an object of classes, each with `share` and `fields`; None: the default mix.

    A value {"file": NAME} stands for the bytes of a file beside the mix, for fields that are images. Raises UsageError,
    naming file and class, if it is invalid.
    """
    if path is None:
        return _classes(DEFAULT, Path(), "the default mix")
    try:
        raw = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a mix of requests ({error})") from None
    return _classes(raw, path.parent, str(path))


def _classes(raw: Any, folder: Path, where: str) -> list[RequestClass]:
    if not isinstance(raw, dict) or not raw:
        raise UsageError(f"{where}: expected an object of classes, each with `share` and `fields`")
    found = []
    for name, entry in raw.items():
        if not isinstance(entry, dict) or set(entry) != {"share", "fields"} or not isinstance(entry["fields"], dict):
            raise UsageError(f"{where}: {name}: a class has `share`, a number, and `fields`, an object")
        share = entry["share"]
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1e9:
            raise UsageError(f"{where}: {name}: share {share!r} is not a positive number")
        if "seed" in entry["fields"]:
            raise UsageError(f"{where}: {name}: the benchmark chooses the seeds; remove `seed`")
        found.append(RequestClass(name, share, {k: _read(v, folder, where) for k, v in entry["fields"].items()}))
    return found


def _read(value: Any, folder: Path, where: str) -> Any:
    if isinstance(value, list):
        return [_read(item, folder, where) for item in value]
    if isinstance(value, dict):
        if set(value) != {"file"}:
            raise UsageError(f'{where}: a field is a value, a list, or {{"file": NAME}}')
        try:
            return (folder / str(value["file"])).read_bytes()
        except OSError as error:
            raise UsageError(f"{where}: {value['file']}: {error.strerror}") from None
    return value


def draw(classes: Sequence[RequestClass], count: int, seed: int = 1) -> list[int]:
    """Return the classes of so many requests: the shares hold in every stretch, the order within one is random."""
    chance = random.Random(seed)
    total = sum(c.share for c in classes)
    owed = [0.0] * len(classes)
    block = max(len(classes), round(total / min(c.share for c in classes)))
    drawn: list[int] = []
    while len(drawn) < count:
        part = []
        for _ in range(block):
            owed = [o + c.share / total for o, c in zip(owed, classes, strict=True)]
            most = max(range(len(classes)), key=owed.__getitem__)
            owed[most] -= 1
            part.append(most)
        chance.shuffle(part)
        drawn += part
    return drawn[:count]
