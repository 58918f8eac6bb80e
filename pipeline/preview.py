"""Previews of an image that is being denoised: a linear map from latents to colors, fitted to the VAE of the artifact.

After a step from noise level s to t, the latents that the model is heading for are x_t - t v, with the velocity v of
that step, since FLUX.2 predicts v = noise - image (rectified flow). A linear map takes each latent pixel, 128 channels
for 16 x 16 pixels, to 2 x 2 colors; so a preview has an eighth of the image's sides. The map is the least-squares fit
to pairs of latents and images, which the VAE encoder makes of "dead leaves": disks of random sizes, colors and order
that hide one another have edges and areas as photographs do (Lee, Mumford, Huang, "Occlusion models for natural
images", IJCV 41, 2001).
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kit.dtypes import Compute, numpy_type
from kit.engine import Array, Engine
from kit.errors import ArtifactError

Float32 = npt.NDArray[np.float32]
PIXELS = 16  # sides of the image that a latent pixel stands for
PREVIEW_FILE = "preview.npz"  # of a deployment, beside the denoiser's graph
CELL = 2  # sides of the preview that it gives
SIDE = 128  # pixels of the images of the fit
IMAGES = 24
HELD_OUT = 4
RIDGE = 1e-3  # relative to the mean variance of a channel
SEED = 20


@dataclass(frozen=True)
class PreviewMap:
    """Colors from latents."""

    weights: Float32  # [C + 1, 12], the last row constant
    residual: float  # root mean square error on images that were not fitted, in levels of 0 to 255

    def apply(self, latents: Float32) -> npt.NDArray[np.uint8]:
        """Return the preview [2h, 2w, 3] of latents [C, h, w]."""
        channels, rows, columns = latents.shape
        flat = latents.reshape(channels, rows * columns).T
        cells = flat @ self.weights[:-1] + self.weights[-1]
        colors = cells.reshape(rows, columns, CELL, CELL, 3).transpose(0, 2, 1, 3, 4)
        levels = np.clip(np.rint(np.nan_to_num(colors)), 0, 255).astype(np.uint8)
        return np.asarray(levels.reshape(rows * CELL, columns * CELL, 3))

    def save(self, path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, weights=self.weights, residual=np.float32(self.residual))

    @classmethod
    def load(cls, path: Path) -> PreviewMap:
        """Read a saved map; raises ArtifactError if it is none."""
        try:
            with path.open("rb") as file, np.load(file) as stored:
                weights, residual = stored["weights"], float(stored["residual"])
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ArtifactError(f"{path}: not a preview map ({error}); write the deployment again") from None
        if weights.ndim != 2 or weights.shape[1] != CELL * CELL * 3:
            raise ArtifactError(f"{path}: weights of shape {list(weights.shape)}; write the deployment again")
        return cls(weights, residual)


def fit(encoder: Engine, compute: Compute) -> PreviewMap:
    """Fit the map to a VAE encoder that takes images of type `compute`; raises EngineError."""
    leaves = np.stack([dead_leaves(SEED + n) for n in range(IMAGES)])
    pixels = (leaves.astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2).astype(numpy_type(compute))
    latents = [encoder.run({"image": image[None]})["latents"][0] for image in pixels]
    rows = [_rows(np.asarray(x, np.float32)) for x in latents]
    colors = [_cells(np.asarray(image)) for image in leaves]
    known = IMAGES - HELD_OUT
    x, y = np.concatenate(rows[:known]).astype(np.float64), np.concatenate(colors[:known]).astype(np.float64)
    gram = x.T @ x
    ridge = RIDGE * np.trace(gram[:-1, :-1]) / (len(gram) - 1) * np.eye(len(gram))
    ridge[-1, -1] = 0
    weights = np.linalg.solve(gram + ridge, x.T @ y)
    error = np.concatenate(rows[known:]) @ weights - np.concatenate(colors[known:])
    return PreviewMap(weights.astype(np.float32), float(np.sqrt(np.mean(error**2))))


def dead_leaves(seed: int, side: int = SIDE) -> npt.NDArray[np.uint8]:
    """Draw disks that hide one another, radii with density r^-3, until they cover an image [side, side, 3].

    Every second image has a few large disks, every other one on a plain ground: the group norms of a VAE see a whole
    image, and areas without detail differ from detailed ones. Half of the colors are saturated.
    """
    chance = np.random.default_rng(seed)
    image = np.empty((side, side, 3), np.uint8)
    image[:] = _color(chance)
    free = np.ones((side, side), bool)
    rows, columns = np.ogrid[:side, :side]
    least, disks = (side / 64, 4000) if seed % 2 else (side / 12, 4 if seed % 4 else 40)
    most = side / 2
    for _ in range(disks):  # front to back
        share = chance.random()
        radius = (least**-2 - share * (least**-2 - most**-2)) ** -0.5
        row, column = chance.uniform(-radius, side + radius, 2)
        disk = free & ((rows - row) ** 2 + (columns - column) ** 2 <= radius**2)
        image[disk] = _color(chance)
        free &= ~disk
        if not free.any():
            break
    return image


def _color(chance: np.random.Generator) -> npt.NDArray[np.int64]:
    return chance.integers(0, 256, 3) if chance.random() < 0.5 else 255 * chance.integers(0, 2, 3)


def _rows(latents: Float32) -> Float32:
    """Return the pixels of latents [C, h, w] as [h * w, C + 1], the last column one."""
    flat = latents.reshape(len(latents), -1).T
    return np.concatenate([flat, np.ones((len(flat), 1), np.float32)], axis=1)


def _cells(image: Array) -> Float32:
    """Return the mean colors [h * w, 12] of an image [H, W, 3]: 2 x 2 for each 16 x 16 pixels."""
    rows, columns = image.shape[0] // PIXELS, image.shape[1] // PIXELS
    part = PIXELS // CELL
    cut = image.reshape(rows, CELL, part, columns, CELL, part, 3).astype(np.float32).mean(axis=(2, 5))
    return np.asarray(cut.transpose(0, 2, 1, 3, 4).reshape(rows * columns, CELL * CELL * 3))
