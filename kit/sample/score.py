"""Compare what the judge reads in an image with the requested scene."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from .judge import Reading, Seen
from .world import ARRANGEMENTS, PLACES, SIDE, Scene, Thing

NEAR = 12.0  # maximum distance in pixels from the requested centre


@dataclass(frozen=True)
class Score:
    """How much of one scene an image shows, as counts that can be added up."""

    things: int
    shapes: int
    colours: int
    sizes: int
    exact: bool  # no thing is missing or extra
    position: bool
    background: bool
    word: bool  # also true if no word was requested and none is present


def match(scene: Scene, reading: Reading) -> list[Seen | None]:
    """Assign to each requested thing the best seen one, by colour, shape and position, without duplicates."""
    left = list(reading.things)
    given: list[Seen | None] = []
    for thing, centre in zip(scene.things, scene.centres(), strict=True):

        def suits(seen: Seen, thing: Thing = thing, centre: tuple[int, int] = centre) -> float:
            far = (seen.centre[0] - centre[0]) ** 2 + (seen.centre[1] - centre[1]) ** 2
            return 2.0 * (seen.colour == thing.colour) + (seen.shape == thing.shape) - far / SIDE**2

        best = max(left, key=suits, default=None)
        if best is not None:
            left.remove(best)
        given.append(best)
    return given


def in_position(scene: Scene, seen: list[Seen | None]) -> bool:
    """Return whether the things are arranged as the sentence says: at a place, in a relation or in an order."""
    spots = [one.centre for one in seen if one is not None]
    if len(spots) < len(scene.things):
        return False
    if len(spots) == 1:
        (x, y), (wanted_x, wanted_y) = spots[0], PLACES[scene.layout][0]
        return max(abs(x - wanted_x), abs(y - wanted_y)) <= NEAR
    vertical = scene.layout in ("above", "below", "in a column")
    along = [spot[1 if vertical else 0] for spot in spots]
    across = [spot[0 if vertical else 1] for spot in spots]
    if scene.layout in ("right of", "below"):
        along.reverse()
    steps = [after - before for before, after in itertools.pairwise(along)]
    apart = min(steps) > 2 * NEAR
    aligned = max(across) - min(across) <= 2 * NEAR
    return apart and aligned and (scene.layout not in ARRANGEMENTS or len(spots) == 3)


def score(scene: Scene, reading: Reading) -> Score:
    """Count what is right; a thing's shape counts only if a thing of its colour was found, and so on."""
    seen = match(scene, reading)
    pairs = [(thing, one) for thing, one in zip(scene.things, seen, strict=True) if one is not None]
    return Score(
        things=len(scene.things),
        shapes=sum(thing.shape == one.shape for thing, one in pairs),
        colours=sum(thing.colour == one.colour for thing, one in pairs),
        sizes=sum(thing.size == one.size for thing, one in pairs),
        exact=len(reading.things) == len(scene.things),
        position=in_position(scene, seen) and all(thing.colour == one.colour for thing, one in pairs),
        background=reading.background == scene.background,
        word=reading.word == scene.word,
    )


def perfect(one: Score) -> bool:
    """Return whether an image shows the whole scene and nothing else."""
    counts = one.shapes == one.colours == one.sizes == one.things
    return counts and one.exact and one.position and one.background and one.word


def summary(scenes: list[Scene], scores: list[Score]) -> dict[str, float | int]:
    """Combine scores into shares."""
    things = sum(one.things for one in scores)
    worded = [one for scene, one in zip(scenes, scores, strict=True) if scene.word]
    wordless = [one for scene, one in zip(scenes, scores, strict=True) if not scene.word]

    def share(right: int, of: int) -> float:
        return round(right / of, 4) if of else 1.0

    return {
        "images": len(scores),
        "things": things,
        "shapes": share(sum(one.shapes for one in scores), things),
        "colours": share(sum(one.colours for one in scores), things),
        "sizes": share(sum(one.sizes for one in scores), things),
        "counts": share(sum(one.exact for one in scores), len(scores)),
        "positions": share(sum(one.position for one in scores), len(scores)),
        "backgrounds": share(sum(one.background for one in scores), len(scores)),
        "words_asked": len(worded),
        "words": share(sum(one.word for one in worded), len(worded)),
        "no_word_where_none_was_asked": share(sum(one.word for one in wordless), len(wordless)),
    }
