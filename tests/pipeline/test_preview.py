"""Previews: a map fitted to a VAE encoder, the image that a step is heading for, and files that are none."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.artifact import read_manifest
from kit.errors import ArtifactError
from kit.ports import Port, Ports
from pipeline.local import LocalPipeline
from pipeline.preview import CELL, PIXELS, PreviewMap, dead_leaves, fit
from runtimes.open import open_parts

PART = PIXELS // CELL
PROMPT = "a red circle left of a blue square on a white background"


class LinearVae:
    """An encoder whose latents hold the mean colors of each quarter, mixed by a rotation."""

    ports = Ports(
        inputs=(Port("image", "fp32", ("batch", 3, "16*latent_height", "16*latent_width")),),
        outputs=(Port("latents", "fp32", ("batch", 16, "latent_height", "latent_width")),),
    )

    def __init__(self) -> None:
        self.mix = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 12)))[0].T

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        n, _, height, width = inputs["image"].shape
        cut = inputs["image"].reshape(n, 3, height // PIXELS, CELL, PART, width // PIXELS, CELL, PART).mean((4, 7))
        cells = cut.transpose(0, 2, 4, 3, 5, 1).reshape(n, height // PIXELS, width // PIXELS, 12)
        return {"latents": (cells @ self.mix + 0.3).transpose(0, 3, 1, 2).astype(np.float32)}


def shrunk(pixels: Any) -> Any:
    height, width, _ = pixels.shape
    return pixels.reshape(height // PART, PART, width // PART, PART, 3).mean((1, 3))


def test_a_linear_vae_is_previewed_exactly() -> None:
    vae = LinearVae()
    made = fit(vae, "fp32")
    assert made.residual < 1
    image = dead_leaves(99)[:96, :64]
    latents = vae.run({"image": (image.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]})["latents"][0]
    preview = made.apply(latents)
    assert preview.shape == (12, 8, 3)
    assert np.abs(preview - shrunk(image)).max() <= 1.5


def test_the_sample_is_previewed_like_its_image_and_early_steps_like_the_end(sample_artifact: Path) -> None:
    manifest = read_manifest(sample_artifact)
    (encoder,) = open_parts(sample_artifact, manifest, ("vae_encoder",)).values()
    made = fit(encoder, "fp32")
    noisy, expected = [], []

    def look(live: Any) -> None:
        noisy.append(made.apply(live[0].image_latents()[0]))
        expected.append(made.apply(live[0].expected_latents()[0]))

    image = LocalPipeline(sample_artifact).generate({"prompt": PROMPT, "seed": 1, "steps": 8}, look).pixels[0]

    def likeness(preview: Any) -> float:
        return float(np.corrcoef(preview.ravel(), shrunk(image).ravel())[0, 1])

    assert likeness(expected[-1]) > 0.9
    np.testing.assert_array_equal(expected[-1], noisy[-1])  # no noise is left
    assert likeness(expected[3]) > 0.8
    assert likeness(expected[3]) > likeness(noisy[3]) + 0.1


def test_a_map_survives_its_file_and_latents_that_are_not_finite(tmp_path: Path) -> None:
    made = PreviewMap(np.ones((5, 12), np.float32), 2.5)
    made.save(tmp_path / "preview.npz")
    read = PreviewMap.load(tmp_path / "preview.npz")
    np.testing.assert_array_equal(read.weights, made.weights)
    assert read.residual == 2.5
    broken = np.full((4, 2, 3), np.nan, np.float32)
    assert read.apply(broken).shape == (4, 6, 3)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"{}"])
def test_a_file_that_is_no_map_is_an_error_that_names_it(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "preview.npz"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"preview\.npz: not a preview map"):
        PreviewMap.load(path)


def test_a_map_of_another_shape_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "preview.npz"
    PreviewMap(np.ones((5, 7), np.float32), 0.0).save(path)
    with pytest.raises(ArtifactError, match=r"shape \[5, 7\]"):
        PreviewMap.load(path)
