"""Draw a scene as an image with flat colours, edges smoothed by supersampling, and bitmap letters."""

from __future__ import annotations

import random
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .edits import Picture
from .font import COLUMNS, ROWS, glyph
from .world import BACKGROUNDS, CELL, COLOURS, JITTER, SIDE, SIZES, WORD_ROW, Scene

Style = Literal["filled", "outlined"]
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

OUTLINE = {"star": 0.35}  # an outline is the shape minus itself scaled by this factor,
OTHER_OUTLINE = 0.55  # chosen so that the thinnest stroke has two pixels
FINE = 3  # samples of an edge pixel per axis
INK = 2  # pixels per dot of a letter


def inside(shape: str, x: Array, y: Array) -> Mask:
    """Return which points are inside a shape of radius 1 around (0, 0); x points right, y down."""
    if shape == "circle":
        return x**2 + y**2 <= 1
    if shape == "square":
        return np.maximum(abs(x), abs(y)) <= 0.88
    if shape == "triangle":
        return (y <= 0.7) & (abs(x) <= (y + 1) / 1.7)
    if shape == "diamond":
        return abs(x) + abs(y) <= 1.05
    if shape == "cross":
        return (np.minimum(abs(x), abs(y)) <= 0.34) & (np.maximum(abs(x), abs(y)) <= 1)
    if shape == "heart":
        u, v = 1.15 * x, 0.1 - 1.12 * y
        return np.asarray((u**2 + v**2 - 1) ** 3 <= u**2 * v**3)
    if shape == "star":
        angle = (np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5  # 0 points to the nearest tip
        slope = np.sin(np.pi / 5) / (1 / 0.42 - np.cos(np.pi / 5))  # from a tip to an inner corner at 0.42
        radius = np.hypot(x, y)
        return np.asarray(radius * (np.cos(angle) + np.abs(np.sin(angle)) / slope) <= 1)
    raise ValueError(f"unknown shape {shape!r}")


def coverage(shape: str, centre: tuple[float, float], radius: float, style: Style, side: int = SIDE) -> Array:
    """Return the fraction of each pixel that a shape covers, 0 to 1, as [side, side]."""
    steps = (np.arange(side * FINE) + 0.5) / FINE
    near_x = np.flatnonzero(abs(steps - centre[0]) <= 1.2 * radius)
    near_y = np.flatnonzero(abs(steps - centre[1]) <= 1.2 * radius)
    x, y = np.meshgrid((steps[near_x] - centre[0]) / radius, (steps[near_y] - centre[1]) / radius)
    body = inside(shape, x, y)
    if style == "outlined":
        inner = OUTLINE.get(shape, OTHER_OUTLINE)
        body &= ~inside(shape, x / inner, y / inner)
    fine = np.zeros((side * FINE, side * FINE))
    fine[near_y[0] : near_y[-1] + 1, near_x[0] : near_x[-1] + 1] = body
    return np.asarray(fine.reshape(side, FINE, side, FINE).mean(axis=(1, 3)))


def first_column(word: str) -> int:
    """Return the column of image tokens in which a word begins."""
    return (SIDE // CELL - len(word)) // 2


def ink(background: str) -> tuple[int, int, int]:
    """Return a letter colour that is readable on a background."""
    return BACKGROUNDS["black"] if background == "white" else BACKGROUNDS["white"]


def letter_cell(letter: str) -> NDArray[np.bool_]:
    """Return the pixels of a letter centred in its cell, as [CELL, CELL]."""
    cell = np.zeros((CELL, CELL), dtype=bool)
    top, left = (CELL - ROWS * INK) // 2, (CELL - COLUMNS * INK) // 2
    cell[top : top + ROWS * INK, left : left + COLUMNS * INK] = glyph(letter, INK)
    return cell


def letters(word: str) -> NDArray[np.bool_]:
    """Return the pixels of a word at its position, as [SIDE, SIDE]."""
    page = np.zeros((SIDE, SIDE), dtype=bool)
    for column, letter in enumerate(word, start=first_column(word)):
        page[WORD_ROW * CELL : (WORD_ROW + 1) * CELL, column * CELL : (column + 1) * CELL] = letter_cell(letter)
    return page


def draw(scene: Scene | Picture, rng: random.Random | None = None, style: Style = "filled") -> NDArray[np.uint8]:
    """Draw a scene as [SIDE, SIDE, 3]; with ``rng`` positions vary by up to JITTER pixels."""
    image = np.empty((SIDE, SIDE, 3))
    image[:] = BACKGROUNDS[scene.background]
    for thing, (x, y) in zip(scene.things, scene.centres(), strict=True):
        if rng is not None:
            x, y = x + rng.randint(-JITTER, JITTER), y + rng.randint(-JITTER, JITTER)
        alpha = coverage(thing.shape, (x, y), SIZES[thing.size], style)[..., None]
        image = (1 - alpha) * image + alpha * np.array(COLOURS[thing.colour])
    image[letters(scene.word)] = ink(scene.background)
    return image.round().astype(np.uint8)
