"""Define the sample's edits: instructions that change one thing or the word of a scene, and their results."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from .world import COLOURS, PLACES, SHAPES, SIZES, UNSEEN_SHAPES, Scene, Thing, random_word

Centre = tuple[int, int]

STEPS = {"left of": (-40, 0), "right of": (40, 0), "above": (0, -32), "below": (0, 32)}  # to the next place, pixels
APART = 2  # minimum gap between two things in pixels


@dataclass(frozen=True)
class Picture:
    """The content of an image by position, for results of edits that no sentence describes."""

    things: tuple[Thing, ...]
    places: tuple[Centre, ...]  # centre (x, y) of each thing, in pixels
    background: str = "white"
    word: str = ""

    def centres(self) -> tuple[Centre, ...]:
        """Return the centre (x, y) of each thing."""
        return self.places


def picture_of(scene: Scene) -> Picture:
    """Return the content of a scene by position."""
    return Picture(scene.things, scene.centres(), scene.background, scene.word)


@dataclass(frozen=True)
class Recolour:
    """Give a thing another colour."""

    name: str
    colour: str

    def __str__(self) -> str:
        return f"make the {self.name} {self.colour}"


@dataclass(frozen=True)
class Add:
    """Add a thing at the place next to another one."""

    thing: Thing
    relation: str
    name: str

    def __str__(self) -> str:
        return f"add {self.thing} {self.relation} the {self.name}"


@dataclass(frozen=True)
class Remove:
    """Remove a thing."""

    name: str

    def __str__(self) -> str:
        return f"remove the {self.name}"


@dataclass(frozen=True)
class SetWord:
    """Replace the word, add one where there is none, or remove it (an empty ``word``)."""

    word: str
    replaces: bool = True

    def __str__(self) -> str:
        if not self.word:
            return "remove the word"
        return f"replace the word by {self.word}" if self.replaces else f"add the word {self.word}"


Edit = Recolour | Add | Remove | SetWord
KINDS: dict[str, type[Recolour] | type[Add] | type[Remove] | type[SetWord]] = {
    "recolour": Recolour,
    "add": Add,
    "remove": Remove,
    "word": SetWord,
}


def kind_of(edit: Edit) -> str:
    """Return the name of an edit's kind."""
    return next(name for name, kind in KINDS.items() if isinstance(edit, kind))


def name_in(picture: Picture, index: int) -> str:
    """Return the shortest name of a thing: its shape, with its colour if another thing has the same shape."""
    thing = picture.things[index]
    alike = sum(other.shape == thing.shape for other in picture.things)
    return thing.shape if alike == 1 else f"{thing.colour} {thing.shape}"


def find(picture: Picture, name: str) -> int:
    """Return the index of the thing that an instruction names; raises ValueError unless there is exactly one."""
    *colour, shape = name.split()
    found = [
        index
        for index, thing in enumerate(picture.things)
        if thing.shape == shape and (not colour or thing.colour == colour[0])
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} things are called {name!r}; there are: {', '.join(map(str, picture.things))}")
    return found[0]


def place_beside(picture: Picture, name: str, relation: str) -> Centre:
    """Return the place next to a thing; raises ValueError if it is outside the grid of places."""
    (x, y), (right, down) = picture.places[find(picture, name)], STEPS[relation]
    centre = (x + right, y + down)
    if (centre,) not in PLACES.values():
        raise ValueError(f"there is no place {relation} the {name}, which is at {(x, y)}")
    return centre


def apply(edit: Edit, picture: Picture) -> Picture:
    """Return the picture after an edit; raises ValueError if it does not apply."""
    things, places = list(picture.things), list(picture.places)
    if isinstance(edit, SetWord):
        if bool(picture.word) != edit.replaces:
            raise ValueError(f"{str(edit)!r} does not apply to a picture with the word {picture.word!r}")
        return replace(picture, word=edit.word)
    if isinstance(edit, Add):
        centre = place_beside(picture, edit.name, edit.relation)
        return replace(picture, things=(*things, edit.thing), places=(*places, centre))
    index = find(picture, edit.name)
    if isinstance(edit, Recolour):
        things[index] = replace(things[index], colour=edit.colour)
    else:
        del things[index], places[index]
    return replace(picture, things=tuple(things), places=tuple(places))


_SHAPE = "|".join(SHAPES + UNSEEN_SHAPES)
_COLOUR = "|".join(COLOURS)
_NAME = rf"((?:(?:{_COLOUR}) )?(?:{_SHAPE}))"
_RECOLOUR = re.compile(rf"make the {_NAME} ({_COLOUR})")
_ADD = re.compile(rf"add an? (?:(small|large) )?({_COLOUR}) ({_SHAPE}) ({'|'.join(STEPS)}) the {_NAME}")
_REMOVE = re.compile(rf"remove the {_NAME}")
_WORD = re.compile(r"(replace the word by|add the word) ([A-Z]{3,5})")


def parse_edit(instruction: str) -> Edit:
    """Parse an instruction; raises ValueError for any other text."""
    if instruction == "remove the word":
        return SetWord("")
    if found := _RECOLOUR.fullmatch(instruction):
        return Recolour(found[1], found[2])
    if found := _ADD.fullmatch(instruction):
        return Add(Thing(found[3], found[2], found[1] or ""), found[4], found[5])
    if found := _REMOVE.fullmatch(instruction):
        return Remove(found[1])
    if found := _WORD.fullmatch(instruction):
        return SetWord(found[2], found[1].startswith("replace"))
    raise ValueError(
        f"not an instruction of the sample's grammar: {instruction!r}; for example: 'make the circle green', "
        f"'add a blue square left of the circle', 'remove the circle', 'replace the word by FLUX'"
    )


def _fits(picture: Picture, index: int, size: str, relation: str) -> bool:
    """Return whether a thing of a size has room beside another, across the step of the relation."""
    step = max(abs(part) for part in STEPS[relation])
    return SIZES[size] + SIZES[picture.things[index].size] + APART <= step


def random_edit(rng: random.Random, scene: Scene, words: tuple[str, ...] | None = None) -> Edit:
    """Return a random edit of a scene, over random scenes each kind about as often; ``words`` limits the new words.

    Things are added to scenes of one thing, because the other layouts have no free place beside a thing.
    """
    alone = len(scene.things) == 1
    kind = rng.choices(sorted(KINDS), weights=(70, 15, 5, 10) if alone else (0, 30, 38, 32))[0]
    picture = picture_of(scene)
    index = rng.randrange(len(scene.things))
    name = name_in(picture, index)
    new_colours = sorted(COLOURS.keys() - {thing.colour for thing in scene.things})
    if kind == "recolour":
        return Recolour(name, rng.choice(new_colours))
    if kind == "remove":
        return Remove(name)
    if kind == "word":
        if scene.word and rng.random() < 0.3:
            return SetWord("")
        other = [word for word in words or () if word != scene.word]
        return SetWord(rng.choice(other) if other else random_word(rng), bool(scene.word))
    relation = rng.choice([relation for relation in STEPS if _free(picture.places[0], relation)])
    size = rng.choice([size for size in SIZES if _fits(picture, 0, size, relation)])
    return Add(Thing(rng.choice(SHAPES), rng.choice(new_colours), size), relation, name)


def _free(centre: Centre, relation: str) -> bool:
    right, down = STEPS[relation]
    return ((centre[0] + right, centre[1] + down),) in PLACES.values()
