"""Read an image of the sample's world: its shapes, colours, sizes and positions, its background and its word.

Classical vision on a known world: every pixel is assigned to the nearest named colour, and connected pixels of one
colour form a thing, completed by pixels that mix its colour with the background. Its filled outline is compared with
every shape at every size, and each letter's cell with the whole font. There is no learning, no network, and no
dependency but numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .draw import OTHER_OUTLINE, OUTLINE, Style, coverage, ink, letter_cell
from .font import GLYPHS
from .world import BACKGROUNDS, CELL, COLOURS, SHAPES, SIDE, SIZES, UNSEEN_SHAPES, WORD_ROW

FIELD = WORD_ROW * CELL  # rows above the word, where things are placed
SMALLEST = 40  # pixels; smaller components are noise
WINDOW = 48  # side of the square in which shapes are compared
HOLLOW = 0.66  # minimum open share of an outline's hole
READABLE = 0.6  # minimum correlation of a letter's cell with its glyph
Mask = NDArray[np.bool_]
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Seen:
    """One thing found in an image."""

    shape: str
    colour: str
    size: str
    style: Style
    centre: tuple[float, float]  # x, y in pixels
    likeness: float  # 1 for a perfect drawing


@dataclass(frozen=True)
class Reading:
    """Everything found in an image."""

    things: tuple[Seen, ...]
    background: str
    word: str


def nearest(image: NDArray[np.uint8], names: dict[str, tuple[int, int, int]]) -> NDArray[np.int_]:
    """Return the index of the nearest named colour for each pixel."""
    palette = np.array(list(names.values()), dtype=np.float64)
    distance = ((image[..., None, :].astype(np.float64) - palette) ** 2).sum(-1)
    return np.asarray(distance.argmin(-1))


def components(mask: Mask) -> list[Mask]:
    """Split a mask into its connected components, largest first; corners connect."""
    pieces, left = [], mask.copy()
    while left.any():
        y, x = np.unravel_index(left.argmax(), left.shape)
        piece, front = np.zeros_like(left), [(int(y), int(x))]
        left[y, x] = False
        while front:
            row, column = front.pop()
            piece[row, column] = True
            for j in range(max(0, row - 1), min(left.shape[0], row + 2)):
                for i in range(max(0, column - 1), min(left.shape[1], column + 2)):
                    if left[j, i]:
                        left[j, i] = False
                        front.append((j, i))
        pieces.append(piece)
    return sorted(pieces, key=lambda piece: -int(piece.sum()))


def filled(mask: Mask) -> Mask:
    """Fill the holes of a mask: everything that the outside cannot reach."""
    open_ground = ~np.pad(mask, 1)
    reached = np.zeros_like(open_ground)
    reached[0] = True
    while True:  # spread along rows and columns until nothing changes
        grown = reached.copy()
        grown[1:] |= reached[:-1]
        grown[:-1] |= reached[1:]
        grown[:, 1:] |= reached[:, :-1]
        grown[:, :-1] |= reached[:, 1:]
        grown &= open_ground
        if (grown == reached).all():
            return ~reached[1:-1, 1:-1]
        reached = grown


def centred(mask: Mask, shift: tuple[int, int] = (0, 0)) -> Mask:
    """Return the mask in a window [WINDOW, WINDOW] around its centre of mass, shifted by ``shift`` (y, x)."""
    rows, columns = np.nonzero(mask)
    top = round(float(rows.mean())) - WINDOW // 2 + shift[0]
    left = round(float(columns.mean())) - WINDOW // 2 + shift[1]
    window = np.zeros((WINDOW, WINDOW), dtype=bool)
    rows, columns = rows - top, columns - left
    within = (rows >= 0) & (rows < WINDOW) & (columns >= 0) & (columns < WINDOW)
    window[rows[within], columns[within]] = True
    return window


@cache
def shape_views() -> tuple[list[tuple[str, str]], Mask]:
    """Return shape and size of every view, and the views [N, WINDOW, WINDOW]."""
    names = [(shape, size) for shape in SHAPES + UNSEEN_SHAPES for size in SIZES]
    middle = (SIDE / 2, SIDE / 2)
    views = [centred(coverage(shape, middle, SIZES[size], "filled") > 0.5) for shape, size in names]
    return names, np.stack(views)


def see_thing(mask: Mask, colour: str) -> Seen:
    """Name the shape, size and style of one connected mask: the view that shares most of its pixels."""
    body = filled(mask)
    names, views = shape_views()
    best, likeness = 0, -1.0
    for shift in [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]:
        window = centred(body, shift)
        alike = (views & window).sum((1, 2)) / (views | window).sum((1, 2))
        if alike.max() > likeness:
            best, likeness = int(alike.argmax()), float(alike.max())
    shape, size = names[best]
    hole = OUTLINE.get(shape, OTHER_OUTLINE) ** 2  # share of the body that an outline of this shape leaves open
    style: Style = "outlined" if body.sum() - mask.sum() > HOLLOW * hole * body.sum() else "filled"
    rows, columns = np.flatnonzero(body.any(1)), np.flatnonzero(body.any(0))
    centre = ((columns[0] + columns[-1]) / 2, (rows[0] + rows[-1]) / 2)
    return Seen(shape, colour, size, style, (float(centre[0]), float(centre[1])), round(likeness, 3))


def see_things(image: NDArray[np.uint8], background: str) -> tuple[Seen, ...]:
    """Find the things above the word's row, most distinct first."""
    palette = {background: BACKGROUNDS[background]} | COLOURS
    names = list(palette)
    field = image[:FIELD].astype(np.float64)
    number = nearest(image[:FIELD], palette)
    # an edge pixel mixes two colours and may resemble a third: keep pixels close to their named colour
    true = np.linalg.norm(field - np.array(list(palette.values()))[number], axis=-1) < 90
    found = []
    for index, name in enumerate(names[1:], start=1):
        for mask in components((number == index) & true):
            if mask.sum() >= SMALLEST / 2 and filled(mask).sum() >= SMALLEST and _thick(mask):
                found.append(see_thing(completed(mask, field, palette[name], palette[background]), name))
    return tuple(sorted(found, key=lambda seen: -seen.likeness))


def completed(core: Mask, field: NDArray[np.float64], colour: RGB, background: RGB) -> Mask:
    """Add the pixels around a core that are at least half its colour and otherwise background: a soft edge."""
    near = np.pad(core, 3)
    for axis in (0, 1):
        near = np.any([np.roll(near, shift, axis) for shift in range(-3, 4)], axis=0)
    ground = np.array(background, float)
    axis_of_mixing = np.array(colour, float) - ground
    share = (field - ground) @ axis_of_mixing / (axis_of_mixing @ axis_of_mixing)
    off_axis = np.linalg.norm(field - ground - share[..., None] * axis_of_mixing, axis=-1)
    return np.asarray(core | (near[3:-3, 3:-3] & (share > 0.5) & (off_axis < 60)))


def _thick(mask: Mask) -> bool:
    """Return whether a mask is a thing and not a fringe of mixed colours: it has many solid 2x2 squares."""
    return int((mask[1:, 1:] & mask[:-1, 1:] & mask[1:, :-1] & mask[:-1, :-1]).sum()) >= 6


def see_word(image: NDArray[np.uint8], background: str) -> str:
    """Read the word's row cell by cell; "?" marks a cell with ink that is not a letter."""
    ground, letter_ink = np.array(BACKGROUNDS[background], float), np.array(ink(background), float)
    line = image[WORD_ROW * CELL :].astype(np.float64)
    axis = letter_ink - ground
    level = ((line - ground) @ axis) / (axis @ axis)  # 0 is background, 1 is ink; [CELL, SIDE]
    word = ""
    for column in range(SIDE // CELL):
        cell = level[:, column * CELL : (column + 1) * CELL]
        if np.clip(cell, 0, 1).sum() < 12:  # the thinnest letter has 36 pixels of ink
            continue
        scores = {letter: float((_unit(cell) * view).sum()) for letter, view in letter_views().items()}
        letter = max(scores, key=scores.__getitem__)
        word += letter if scores[letter] >= READABLE else "?"
    return word


def _unit(cell: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a cell without its mean, scaled to unit length."""
    centred = cell - cell.mean()
    return np.asarray(centred / max(1e-9, float(np.linalg.norm(centred))))


@cache
def letter_views() -> dict[str, NDArray[np.float64]]:
    """Return each letter in its cell, without its mean, scaled to unit length."""
    return {letter: _unit(letter_cell(letter).astype(np.float64)) for letter in GLYPHS}


def read(image: NDArray[np.uint8]) -> Reading:
    """Read an image [SIDE, SIDE, 3] of bytes; raises ValueError for another size."""
    if image.shape != (SIDE, SIDE, 3) or image.dtype != np.uint8:
        raise ValueError(f"expected {SIDE}x{SIDE} RGB bytes, not {image.shape} of {image.dtype}")
    numbers = nearest(image, BACKGROUNDS | COLOURS)
    names = list(BACKGROUNDS)
    background = names[int(np.bincount(numbers.ravel(), minlength=len(names))[: len(names)].argmax())]
    return Reading(see_things(image, background), background, see_word(image, background))
