"""Define the sample's world: the content of its images, the grammar of its prompts, and random scenes."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

SIDE = 128  # pixels per side of an image; one image token covers 16
CELL = 16  # pixels of a letter's cell: exactly one image token
WORD_ROW = 7  # the row of image tokens that holds a word

SHAPES = ("circle", "square", "triangle", "diamond", "cross", "heart")
UNSEEN_SHAPES = ("star",)  # in the grammar but in no training image: the object that a LoRA teaches
SIZES = {"small": 9.0, "": 13.0, "large": 17.0}  # radius in pixels; "" is the size that prompts do not mention
COLOURS = {
    "red": (220, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 50),
    "green": (35, 150, 60),
    "cyan": (50, 205, 215),
    "blue": (35, 65, 215),
    "purple": (130, 45, 170),
    "pink": (250, 135, 190),
}
BACKGROUNDS = {"white": (250, 250, 250), "black": (12, 12, 12), "gray": (128, 128, 128), "brown": (105, 68, 38)}

# A layout is a phrase and the centre of each thing, in the order of the sentence.
PLACES = {
    "": ((64, 54),),
    "in the top left": ((24, 22),),
    "at the top": ((64, 22),),
    "in the top right": ((104, 22),),
    "at the left": ((24, 54),),
    "at the right": ((104, 54),),
    "in the bottom left": ((24, 86),),
    "at the bottom": ((64, 86),),
    "in the bottom right": ((104, 86),),
}
RELATIONS = {
    "left of": ((36, 54), (92, 54)),
    "right of": ((92, 54), (36, 54)),
    "above": ((64, 30), (64, 80)),
    "below": ((64, 80), (64, 30)),
}
ARRANGEMENTS = {"in a row": ((24, 54), (64, 54), (104, 54)), "in a column": ((64, 19), (64, 55), (64, 91))}
LAYOUTS = (PLACES, RELATIONS, ARRANGEMENTS)  # for one, two and three things
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
JITTER = 2  # maximum random offset of a centre, in pixels

# Words kept for the evaluation: training spells random words and skips these.
_HELD_OUT = (
    "HELLO WORLD FLUX KLEIN MOON STAR FISH BIRD TREE CAKE JAZZ QUIZ WAVE FROG LAMP DESK VIEW ZERO KING OPEN BLUE "
    "GREEN YELL JUMP QUICK FOX DOG CAT SUN ICE ART VOW WHY ZOO MIX PUB HUG KEY BOX TEN NEXT MUSIC PIANO HOUSE "
    "RIVER STONE BREAD TIGER ZEBRA QUEEN VIDEO WATER XENON YACHT NIGHT OCEAN PARTY "
)
HELD_OUT_WORDS = tuple(_HELD_OUT.split())


@dataclass(frozen=True)
class Thing:
    """One shape in an image."""

    shape: str
    colour: str
    size: str = ""

    def __str__(self) -> str:
        said = " ".join(part for part in (self.size, self.colour, self.shape) if part)
        return f"{'an' if said.startswith('orange') else 'a'} {said}"


@dataclass(frozen=True)
class Scene:
    """The content that a sentence of the grammar describes."""

    things: tuple[Thing, ...]
    layout: str = ""
    background: str = "white"
    word: str = ""

    def centres(self) -> tuple[tuple[int, int], ...]:
        """Return the centre (x, y) of each thing, before jitter."""
        return LAYOUTS[len(self.things) - 1][self.layout]

    def prompt(self) -> str:
        """Describe the scene in one sentence."""
        if len(self.things) == 1:
            said = f"{self.things[0]} {self.layout}".rstrip()
        elif len(self.things) == 2:
            said = f"{self.things[0]} {self.layout} {self.things[1]}"
        else:
            said = f"{self.things[0]}, {self.things[1]} and {self.things[2]} {self.layout}"
        said += f" on a {self.background} background"
        return f"{said}, with the word {self.word}" if self.word else said


def _choice(words: object) -> str:
    return "|".join(sorted((w for w in words if w), key=len, reverse=True))  # type: ignore[attr-defined]


_THING = rf"an? (?:(small|large) )?({_choice(COLOURS)}) ({_choice(SHAPES + UNSEEN_SHAPES)})"
_TAIL = rf"(?: on a ({_choice(BACKGROUNDS)}) background)?(?:, with the word ([A-Z]{{3,5}}))?"
_SENTENCES = (
    re.compile(rf"{_THING}(?: ({_choice(PLACES)}))?{_TAIL}"),
    re.compile(rf"{_THING} ({_choice(RELATIONS)}) {_THING}{_TAIL}"),
    re.compile(rf"{_THING}, {_THING} and {_THING} ({_choice(ARRANGEMENTS)}){_TAIL}"),
)


def parse(prompt: str) -> Scene:
    """Parse a sentence of the grammar; raises ValueError for any other text."""
    for count, sentence in enumerate(_SENTENCES, start=1):
        found = sentence.fullmatch(prompt)
        if found is None:
            continue
        said = [part or "" for part in found.groups()]
        background, word = said[-2:]
        if count == 2:  # the relation is between the two things
            said = [*said[:3], *said[4:7], said[3]]
        things = tuple(Thing(said[3 * i + 2], said[3 * i + 1], said[3 * i]) for i in range(count))
        return Scene(things, said[3 * count], background or "white", word)
    raise ValueError(
        f"not a sentence of the sample's grammar: {prompt!r}; for example: 'a red circle left of a blue "
        f"square on a white background, with the word HELLO'"
    )


def random_word(rng: random.Random) -> str:
    """Spell three to five random capitals that are not a held-out word."""
    while True:
        word = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(3, 5)))
        if word not in HELD_OUT_WORDS:
            return word


def random_scene(rng: random.Random, shapes: tuple[str, ...] = SHAPES, words: tuple[str, ...] | None = None) -> Scene:
    """Return a random scene: one to three things, with a word in two of three scenes; ``words`` limits the words."""
    count = rng.choice((1, 1, 2, 2, 2, 3))
    colours = rng.sample(sorted(COLOURS), count)  # no two things share a colour, so that they can be told apart
    sizes = tuple(SIZES)
    things = tuple(Thing(rng.choice(shapes), colour, rng.choice(sizes)) for colour in colours)
    word = ""
    if rng.random() < 2 / 3:
        word = rng.choice(words) if words else random_word(rng)
    return Scene(things, rng.choice(sorted(LAYOUTS[count - 1])), rng.choice(sorted(BACKGROUNDS)), word)
