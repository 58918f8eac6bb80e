"""Every exported part matches its torch module for every family, size, batch and form of attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import pytest
import torch

from export.artifact import ExportConfig, export
from export.graphs.attention import Attention
from export.parts import PARTS
from kit import tiny
from kit.ports import PartName
from kit.variants import Family

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
CASES: list[tuple[Family, Attention]] = [
    ("klein", "matmul"),
    ("klein-base", "matmul"),
    ("dev", "matmul"),
    ("klein", "op"),
    ("dev", "op"),  # klein-base has the graphs of klein
]
SIZES = [(64, 64), (96, 128), (128, 64)]  # height, width in pixels
PROMPTS = ("a red fox in the snow", "two boats on a lake at night, oil painting", "x", "")
TOKENS = 512
TOLERANCE = 1e-4  # relative to the largest output

ArtifactOf = Callable[[Family, Attention], Path]


@pytest.fixture(scope="module")
def exported(
    artifact_of: Callable[[Family], Path], checkpoint_of: Callable[[Family], Path], tmp_path_factory: Any
) -> ArtifactOf:
    """Export with the other form of attention if a test asks for it."""

    @cache
    def make(family: Family, attention: Attention) -> Path:
        if attention == "matmul":
            return artifact_of(family)
        out: Path = tmp_path_factory.mktemp("op") / family
        export(checkpoint_of(family), out, ExportConfig(attention=attention))
        return out

    return make


@cache
def pipeline(family: Family) -> Any:
    return tiny.pipeline(tiny.Tiny(family))


@cache
def session(artifact: Path, part: PartName, threads: int = 1) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    return ort.InferenceSession(artifact / PARTS[part].graph, options, providers=["CPUExecutionProvider"])


def run(artifact: Path, part: PartName, feeds: Feeds, threads: int = 1) -> Array:
    result: Array = session(artifact, part, threads).run(None, feeds)[0]
    return result


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_close(found: Array, expected: torch.Tensor) -> None:
    difference = np.abs(found - expected.numpy()) / expected.abs().max().item()
    assert found.shape == expected.shape
    assert difference.max() <= TOLERANCE, f"max {difference.max():.2e}, mean {difference.mean():.2e} of the scale"


def transformer_feeds(family: Family, batch: int, height: int, width: int) -> Feeds:
    """Rows of different noise, text, timestep and guidance, at the positions of an image."""
    tokens = height * width
    image = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width), torch.arange(1))
    text = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(TOKENS))
    joint = pipeline(family).transformer.config.joint_attention_dim
    feeds = {
        "hidden_states": noise(batch, tokens, 128).numpy(),
        "encoder_hidden_states": noise(batch, TOKENS, joint).numpy(),
        "timestep": np.linspace(0.95, 0.2, batch, dtype=np.float32),
        "img_ids": image.repeat(batch, 1, 1).numpy(),
        "txt_ids": text.repeat(batch, 1, 1).numpy(),
    }
    if family == "dev":
        feeds["guidance"] = np.linspace(4.0, 1.5, batch, dtype=np.float32)
    return feeds


def transformer_reference(family: Family, feeds: Feeds) -> torch.Tensor:
    """Run diffusers row by row, because its transformer uses the position ids of the first row for all rows."""
    rows = []
    for i in range(len(feeds["timestep"])):
        row = {name: torch.from_numpy(array[i : i + 1]) for name, array in feeds.items()}
        with torch.no_grad():
            rows.append(pipeline(family).transformer(**row, return_dict=False)[0])
    return torch.cat(rows)


@cache
def text_feeds(family: Family, prompts: tuple[str, ...]) -> tuple[Feeds, torch.Tensor]:
    """Return the inputs of the pipeline's text encoder and the resulting embeddings."""
    pipe = pipeline(family)
    fed: dict[str, torch.Tensor] = {}
    hook = pipe.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: fed.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        embeds = pipe.encode_prompt(list(prompts))[0]
    hook.remove()
    return {name: fed[name].numpy() for name in ("input_ids", "attention_mask")}, embeds


@pytest.mark.parametrize(("family", "attention"), CASES)
class TestParity:
    """fp32 on the CPU, against the modules of diffusers and transformers."""

    @pytest.mark.parametrize("batch", [1, 2, 3])
    @pytest.mark.parametrize("size", SIZES)
    def test_transformer(
        self, exported: ArtifactOf, family: Family, attention: Attention, size: tuple[int, int], batch: int
    ) -> None:
        feeds = transformer_feeds(family, batch, size[0] // 16, size[1] // 16)
        found = run(exported(family, attention), "transformer", feeds)
        assert_close(found, transformer_reference(family, feeds))

    def test_transformer_with_position_ids_of_its_own_in_every_row(
        self, exported: ArtifactOf, family: Family, attention: Attention
    ) -> None:
        feeds = transformer_feeds(family, 3, 6, 8)
        other = torch.cartesian_prod(torch.tensor([10]), torch.arange(8), torch.arange(6), torch.arange(1))
        feeds["img_ids"][1] = other.numpy()  # another layout with the same number of tokens, as for a reference image
        feeds["txt_ids"][2, :, 3] += 100
        found = run(exported(family, attention), "transformer", feeds)
        assert_close(found, transformer_reference(family, feeds))
        same_ids = run(
            exported(family, attention), "transformer", feeds | transformer_ids(transformer_feeds(family, 3, 6, 8))
        )
        assert np.array_equal(found[0], same_ids[0])
        assert np.abs(found[1:] - same_ids[1:]).max() > 0.01  # ids are not ignored

    @pytest.mark.parametrize("batch", [1, 2, 3])
    def test_text_encoder_on_all_rows_padding_too(
        self, exported: ArtifactOf, family: Family, attention: Attention, batch: int
    ) -> None:
        feeds, embeds = text_feeds(family, PROMPTS[:batch])
        assert_close(run(exported(family, attention), "text_encoder", feeds), embeds)

    @pytest.mark.parametrize("batch", [1, 2, 3])
    @pytest.mark.parametrize("size", SIZES)
    def test_vae_encoder(
        self, exported: ArtifactOf, family: Family, attention: Attention, size: tuple[int, int], batch: int
    ) -> None:
        image = noise(batch, 3, *size).clamp(-1, 1)
        with torch.no_grad():
            expected = pipeline(family)._encode_vae_image(image, None)
        assert_close(run(exported(family, attention), "vae_encoder", {"image": image.numpy()}), expected)

    @pytest.mark.parametrize("batch", [1, 2, 3])
    @pytest.mark.parametrize("size", SIZES)
    def test_vae_decoder(
        self, exported: ArtifactOf, family: Family, attention: Attention, size: tuple[int, int], batch: int
    ) -> None:
        latents = noise(batch, 128, size[0] // 16, size[1] // 16)
        found = run(exported(family, attention), "vae_decoder", {"latents": latents.numpy()})
        expected = decode(pipeline(family), latents)
        difference = np.abs(found.astype(int) - expected.astype(int))
        assert found.dtype == np.uint8
        assert found.shape == (batch, *size, 3)
        assert difference.max() <= 1
        assert (difference == 0).mean() >= 0.999


def transformer_ids(feeds: Feeds) -> Feeds:
    return {name: feeds[name] for name in ("img_ids", "txt_ids")}


def decode(pipe: Any, latents: torch.Tensor) -> npt.NDArray[np.uint8]:
    """Repeat what the pipeline does after its last step."""
    bn = pipe.vae.bn
    mean, variance = (x.view(1, -1, 1, 1) for x in (bn.running_mean, bn.running_var))
    with torch.no_grad():
        raw = pipe._unpatchify_latents(latents * torch.sqrt(variance + pipe.vae.config.batch_norm_eps) + mean)
        images = pipe.image_processor.postprocess(pipe.vae.decode(raw, return_dict=False)[0], output_type="pil")
    return np.stack([np.asarray(image) for image in images])


def test_both_paddings_are_met_by_the_prompts() -> None:
    right, left = text_feeds("klein", PROMPTS)[0], text_feeds("dev", PROMPTS)[0]
    assert right["attention_mask"][:, 0].all()
    assert not right["attention_mask"][:, -1].any()
    assert left["attention_mask"][:, -1].all()
    assert not left["attention_mask"][:, 0].any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", ["klein", "dev"])
class TestBatchInvariance:
    """Row i of a batch is bitwise equal to the same row alone, so requests may share batches."""

    def check(self, artifact: Path, part: PartName, feeds: Feeds, threads: int) -> None:
        rows = len(next(iter(feeds.values())))
        alone = [run(artifact, part, {k: v[i : i + 1] for k, v in feeds.items()}, threads)[0] for i in range(rows)]
        for batch in ([0, 1], [1, 0], [2, 3], [0, 2, 3], [3, 1, 2], [3, 2, 1, 0]):
            together = run(artifact, part, {k: v[batch] for k, v in feeds.items()}, threads)
            for found, i in zip(together, batch, strict=True):
                assert np.array_equal(found, alone[i]), f"row {i} of {batch}: {np.abs(found - alone[i]).max()}"

    @pytest.mark.parametrize("size", [(4, 4), (6, 8), (7, 7), (3, 5), (1, 1)])
    def test_transformer(
        self, artifact_of: Callable[[Family], Path], family: Family, size: tuple[int, int], threads: int
    ) -> None:
        self.check(artifact_of(family), "transformer", transformer_feeds(family, 4, *size), threads)

    def test_text_encoder(self, artifact_of: Callable[[Family], Path], family: Family, threads: int) -> None:
        self.check(artifact_of(family), "text_encoder", text_feeds(family, PROMPTS)[0], threads)

    @pytest.mark.parametrize("size", [(4, 4), (6, 8), (7, 7), (1, 1)])
    def test_vae_decoder(
        self, artifact_of: Callable[[Family], Path], family: Family, size: tuple[int, int], threads: int
    ) -> None:
        self.check(artifact_of(family), "vae_decoder", {"latents": noise(4, 128, *size).numpy()}, threads)

    @pytest.mark.parametrize("size", [(4, 4), (3, 5)])
    def test_vae_encoder(
        self, artifact_of: Callable[[Family], Path], family: Family, size: tuple[int, int], threads: int
    ) -> None:
        image = noise(4, 3, 16 * size[0], 16 * size[1]).numpy()
        self.check(artifact_of(family), "vae_encoder", {"image": image}, threads)


def test_heads_of_real_width_and_their_four_axes(tmp_path: Path) -> None:
    """Heads of 128 and rotary axes of 32 as published; `benchmarks parity` covers the other widths."""
    made = tiny.Tiny(double_blocks=2, single_blocks=2, heads=4, head_dim=128, text_hidden=64, text_tokens=64, gain=1.0)
    export(tiny.save(tmp_path / "checkpoint", made), tmp_path / "out", ExportConfig(("transformer",)))
    feeds = {
        "hidden_states": noise(2, 48, 128).numpy(),
        "encoder_hidden_states": noise(2, 64, 192).numpy(),
        "timestep": np.array([0.9, 0.3], np.float32),
        "img_ids": torch.cartesian_prod(*map(torch.arange, (1, 6, 8, 1))).repeat(2, 1, 1).numpy(),
        "txt_ids": torch.cartesian_prod(*map(torch.arange, (1, 1, 1, 64))).repeat(2, 1, 1).numpy(),
    }
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
        expected = tiny.pipeline(made).transformer(**tensors, return_dict=False)[0]
    assert_close(run(tmp_path / "out", "transformer", feeds), expected)
