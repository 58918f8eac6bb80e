"""The small decoder matches diffusers when loaded from a folder, a file with an encoder, or a decoder-only file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import save_file

from export.__main__ import main
from export.artifact import ExportConfig, export
from export.single_file import sizes_of_vae
from export.sources import find_sources
from export.trace import FakePart
from kit import tiny
from kit.artifact import verify
from kit.configs import read_variant
from kit.errors import CheckpointError
from kit.ports import PartName
from kit.variants import VARIANTS, Vae, Variant
from tests.conftest import ByFamily
from tests.export.bfl import State
from tests.export.test_parity_parts import assert_close, decode, noise, pipeline, run
from tests.export.test_single_file import load, vae_to_bfl

SMALL = (8, 16, 24, 24)  # of the tiny checkpoint, whose whole VAE has 8, 16, 32, 32
BOTH: tuple[PartName, ...] = ("vae_encoder", "vae_decoder")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("small") / "checkpoint", tiny.Tiny(small_decoder=True, seed=4))


@pytest.fixture(scope="module")
def state(small: Path) -> State:
    return vae_to_bfl(load(small, "vae"))


def assert_generates_like(artifact: Path, vae: AutoencoderKLFlux2, encoder: AutoencoderKLFlux2) -> None:
    """Compare both halves with diffusers: images may differ by rounding, latents by 1e-4 of their scale."""
    pipe = pipeline("klein")
    latents, image = noise(2, 128, 3, 5), noise(1, 3, 48, 32).clamp(-1, 1)
    before = pipe.vae
    try:
        pipe.vae = vae
        expected = decode(pipe, latents)
        pipe.vae = encoder
        with torch.no_grad():
            encoded = pipe._encode_vae_image(image, None)
    finally:
        pipe.vae = before
    off = np.abs(run(artifact, "vae_decoder", {"latents": latents.numpy()}).astype(int) - expected.astype(int))
    assert off.max() <= 1
    assert (off == 0).mean() >= 0.999
    assert_close(run(artifact, "vae_encoder", {"image": image.numpy()}), encoded)
    assert verify(artifact).variant.vae.decoder_channels == SMALL


def test_from_a_folder_it_generates_what_diffusers_generates(small: Path, tmp_path: Path) -> None:
    export(small, tmp_path / "out", ExportConfig(BOTH))
    vae = AutoencoderKLFlux2.from_pretrained(small / "vae")
    assert_generates_like(tmp_path / "out", vae, vae)


@pytest.mark.parametrize("names", ["black-forest-labs", "diffusers"])
def test_a_file_tells_the_widths_of_its_decoder_whatever_the_checkpoint_has(
    checkpoint_of: ByFamily, small: Path, state: State, tmp_path: Path, names: str
) -> None:
    file = tmp_path / "full_encoder_small_decoder.safetensors"
    save_file(state if names == "black-forest-labs" else load(small, "vae"), file)
    assert read_variant(checkpoint_of("klein")).vae.decoder_channels == (8, 16, 32, 32)
    export(checkpoint_of("klein"), tmp_path / "out", ExportConfig(BOTH, single_files={"vae": file}))
    vae = AutoencoderKLFlux2.from_pretrained(small / "vae")
    assert_generates_like(tmp_path / "out", vae, vae)


def test_a_file_of_the_decoder_alone_leaves_the_encoder_to_the_checkpoint(
    checkpoint_of: ByFamily, small: Path, state: State, tmp_path: Path
) -> None:
    file = tmp_path / "small_decoder.safetensors"
    save_file({name: tensor for name, tensor in state.items() if name.startswith(("decoder.", "bn."))}, file)
    checkpoint = checkpoint_of("klein")
    argv = ["onnx", str(checkpoint), "--out", str(tmp_path / "out"), "--parts", ",".join(BOTH), "--vae", str(file)]
    assert main(argv) == 0
    vae, encoder = (AutoencoderKLFlux2.from_pretrained(folder / "vae") for folder in (small, checkpoint))
    encoder.bn.load_state_dict(vae.bn.state_dict())  # both halves use the statistics of the file, if it has any
    assert_generates_like(tmp_path / "out", vae, encoder)
    source = verify(tmp_path / "out").source
    assert "vae/diffusion_pytorch_model.safetensors" in source["files"]
    assert source["single_files"]["vae"]["file"] == "small_decoder.safetensors"
    assert find_sources(str(checkpoint), BOTH, vae=str(file)).single_files == {"vae": file}


def test_statistics_that_the_decoder_s_file_lacks_are_the_checkpoint_s(
    checkpoint_of: ByFamily, state: State, tmp_path: Path
) -> None:
    file = tmp_path / "small_decoder.safetensors"
    save_file({name: tensor for name, tensor in state.items() if name.startswith("decoder.")}, file)
    config = ExportConfig(("vae_decoder",), single_files={"vae": file})
    export(checkpoint_of("klein"), tmp_path / "out", config)
    assert {path.name for path in (tmp_path / "out" / "vae_decoder").iterdir()} == {
        "diffusion_pytorch_model.safetensors",
        "model.onnx",
        "small_decoder.safetensors",
    }
    assert export(checkpoint_of("klein"), tmp_path / "out", config).up_to_date


def test_a_decoder_that_lacks_a_block_is_refused_by_name(checkpoint_of: ByFamily, state: State, tmp_path: Path) -> None:
    file = tmp_path / "small_decoder.safetensors"
    left = {name: tensor for name, tensor in state.items() if not name.startswith("decoder.up.1.block.0.conv1")}
    save_file(left, file)
    with pytest.raises(CheckpointError, match=r"small_decoder.safetensors: tensor 'decoder\..*' .*"):
        export(checkpoint_of("klein"), tmp_path / "out", ExportConfig(("vae_decoder",), single_files={"vae": file}))
    assert not (tmp_path / "out").exists()


def test_the_published_widths_give_the_published_number_of_parameters() -> None:
    """27.9 million in the small decoder, 49.6 million in the full one, both with the convolution in front."""
    counts = []
    for widths in ((96, 192, 384, 384), Vae.decoder_channels):
        vae = Vae(decoder_channels=widths)
        variant = VARIANTS["klein-4b"]
        fake = FakePart("vae_decoder", Variant(**{**vars(variant), "vae": vae}), "bf16", "matmul")
        counts.append(sum(int(np.prod(s)) for n, s in fake.shapes().items() if not n.startswith("bn.")))
    assert [round(count / 1e6, 1) for count in counts] == [27.9, 49.6]


def test_a_file_that_is_no_vae_keeps_the_sizes_of_the_config(tmp_path: Path) -> None:
    save_file({"decoder.conv_in.weight": torch.ones(2, 2)}, tmp_path / "other.safetensors")
    assert sizes_of_vae(tmp_path / "other.safetensors", Vae()) == Vae()
