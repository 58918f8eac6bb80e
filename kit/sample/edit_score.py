"""Judge an edited image: whether the edit was made, and how much of the rest stayed as it was."""

from __future__ import annotations

from dataclasses import dataclass

from .edits import Add, Centre, Edit, Picture, Recolour, Remove, SetWord, apply, find
from .judge import Reading, Seen
from .score import NEAR
from .world import Thing

STILL = 6.0  # maximum move in pixels, along each axis, of a thing that stays


@dataclass(frozen=True)
class EditScore:
    """One edited image, in counts that can be added up.

    What should stay: the other things with shape, colour, size and place, the shape and size of a thing that changes
    its colour, the background, the word unless it is edited, and that nothing else appears.
    """

    made: bool
    should_stay: int
    stayed: int


def picture_from(reading: Reading) -> Picture:
    """Return the content that the judge read in an image, for an edit of an image whose scene is not known."""
    things = tuple(Thing(seen.shape, seen.colour, seen.size) for seen in reading.things)
    places = tuple((round(seen.centre[0]), round(seen.centre[1])) for seen in reading.things)
    return Picture(things, places, reading.background, reading.word)


def seen_at(reading: Reading, centre: Centre, within: float = NEAR) -> Seen | None:
    """Return the thing nearest to a place, None if there is none within ``within`` pixels along each axis."""

    def far(seen: Seen) -> float:
        return max(abs(seen.centre[0] - centre[0]), abs(seen.centre[1] - centre[1]))

    nearest = min(reading.things, key=far, default=None)
    return nearest if nearest is not None and far(nearest) <= within else None


def shows(reading: Reading, thing: Thing, centre: Centre, within: float = NEAR) -> bool:
    """Return whether a thing is at a place."""
    seen = seen_at(reading, centre, within)
    return seen is not None and (seen.shape, seen.colour, seen.size) == (thing.shape, thing.colour, thing.size)


def is_made(edit: Edit, before: Picture, after: Picture, reading: Reading) -> bool:
    """Return whether an image shows what an edit asks for, whatever else it shows."""
    if isinstance(edit, SetWord):
        return reading.word == after.word
    if isinstance(edit, Add):
        return shows(reading, after.things[-1], after.places[-1])
    seen = seen_at(reading, before.places[find(before, edit.name)])
    if isinstance(edit, Remove):
        return seen is None
    return seen is not None and seen.colour == edit.colour


def score_edit(edit: Edit, before: Picture, reading: Reading) -> EditScore:
    """Judge what was read in an edited image; ``before`` is the content of the reference image.

    Raises ValueError if the edit does not apply to ``before``.
    """
    after = apply(edit, before)
    touched = find(before, edit.name) if isinstance(edit, Recolour | Remove) else None
    stays = [
        shows(reading, thing, centre, STILL)
        for index, (thing, centre) in enumerate(zip(before.things, before.places, strict=True))
        if index != touched
    ]
    if isinstance(edit, Recolour) and touched is not None:
        seen, was = seen_at(reading, before.places[touched], STILL), before.things[touched]
        stays.append(seen is not None and (seen.shape, seen.size) == (was.shape, was.size))
    stays.append(reading.background == before.background)
    if not isinstance(edit, SetWord):
        stays.append(reading.word == before.word)
    known = {id(seen_at(reading, centre)) for centre in (*before.places, *after.places)}
    stays.append(all(id(seen) in known for seen in reading.things))
    return EditScore(is_made(edit, before, after, reading), len(stays), sum(stays))
