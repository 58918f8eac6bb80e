"""klein-kv's two graphs, from references to keys and values and the transformer that reads them, match diffusers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from export.artifact import ExportConfig, export
from export.graphs.attention import Attention
from export.lora.terms import Lora
from export.trace import FakePart
from kit import tiny
from kit.artifact import verify
from kit.errors import CheckpointError, UsageError
from kit.ports import KV_PARTS, PARTS, parts_of, ports
from kit.variants import VARIANTS
from pipeline.schedule import sigmas
from tests.conftest import ByFamily
from tests.export.test_parity_parts import TOKENS, Array, Feeds, assert_close, noise, run, session

BLOCKS = 5  # of the tiny checkpoint: 2 double, 3 single
REFERENCES = [((4, 4),), ((2, 3), (4, 2))]  # height and width in tokens of each reference image


@cache
def pipeline() -> Any:
    return tiny.pipeline(tiny.Tiny("klein-kv"))


@pytest.fixture(scope="module", params=["matmul", "op"])
def artifact(request: Any, checkpoint_of: ByFamily, artifact_of: ByFamily, tmp_path_factory: Any) -> Path:
    """Export the tiny klein-kv with each form of attention."""
    form: Attention = request.param
    if form == "matmul":
        return artifact_of("klein-kv")
    out: Path = tmp_path_factory.mktemp("op") / "klein-kv"
    export(checkpoint_of("klein-kv"), out, ExportConfig(parts=KV_PARTS, attention=form))
    return out


def grid(time: int, height: int, width: int) -> torch.Tensor:
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(height), torch.arange(width), torch.arange(1))


def feeds_of(references: tuple[tuple[int, int], ...], batch: int) -> tuple[Feeds, Feeds]:
    """Return the inputs of the extracting graph, and the inputs of the cached one except its keys and values."""
    places = torch.cat([grid(10 + 10 * i, *size) for i, size in enumerate(references)])
    text = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(TOKENS))
    extract = {
        "ref_hidden_states": noise(batch, len(places), 128).numpy(),
        "ref_ids": places.repeat(batch, 1, 1).numpy(),
    }
    cached = {
        "hidden_states": noise(batch, 6 * 5, 128).numpy(),
        "encoder_hidden_states": noise(batch, TOKENS, pipeline().transformer.config.joint_attention_dim).numpy(),
        "timestep": np.linspace(0.95, 0.2, batch, dtype=np.float32),
        "img_ids": grid(0, 6, 5).repeat(batch, 1, 1).numpy(),
        "txt_ids": text.repeat(batch, 1, 1).numpy(),
    }
    return extract, cached


def extracted(artifact: Path, feeds: Feeds) -> Feeds:
    runner = session(artifact, "transformer_extract")
    return dict(zip([port.name for port in runner.get_outputs()], runner.run(None, feeds), strict=True))


def both(references: Feeds, rest: Feeds) -> tuple[dict[str, Any], int]:
    """Return the inputs of diffusers' first step: references before the image in one sequence."""
    tensors = {name: torch.from_numpy(array) for name, array in rest.items()}
    for ours, theirs in (("ref_hidden_states", "hidden_states"), ("ref_ids", "img_ids")):
        tensors[theirs] = torch.cat([torch.from_numpy(references[ours]), tensors[theirs]], dim=1)
    return tensors, references["ref_ids"].shape[1]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("references", REFERENCES)
class TestParity:
    """fp32 on the CPU, against the two modes of diffusers' transformer."""

    @pytest.fixture
    def remembered(self, references: tuple[tuple[int, int], ...], batch: int) -> tuple[torch.Tensor, Any]:
        """Return the velocity and the cache of diffusers' first step."""
        tensors, count = both(*feeds_of(references, batch))
        with torch.no_grad():
            out = pipeline().transformer(**tensors, kv_cache_mode="extract", num_ref_tokens=count, return_dict=False)
        return out[0], out[1]

    def test_keys_and_values_of_every_block(
        self, artifact: Path, references: tuple[tuple[int, int], ...], batch: int, remembered: tuple[torch.Tensor, Any]
    ) -> None:
        _, memory = remembered
        found = extracted(artifact, feeds_of(references, batch)[0])
        assert len(found) == 2 * BLOCKS
        for i, block in enumerate((*memory.double_block_caches, *memory.single_block_caches)):
            for kind, expected in zip(("key", "value"), block.get(), strict=True):
                assert_close(found[f"ref_{kind}_{i}"], expected.transpose(1, 2))

    def test_velocity_of_the_first_step_and_of_later_ones(
        self, artifact: Path, references: tuple[tuple[int, int], ...], batch: int, remembered: tuple[torch.Tensor, Any]
    ) -> None:
        first, memory = remembered
        extract, rest = feeds_of(references, batch)
        cached = extracted(artifact, extract)
        assert_close(run(artifact, "transformer_cached", rest | cached), first)
        later = rest | {"timestep": rest["timestep"] / 2, "hidden_states": rest["hidden_states"][:, ::-1].copy()}
        with torch.no_grad():
            expected = pipeline().transformer(
                **{name: torch.from_numpy(array) for name, array in later.items()},
                kv_cache=memory,
                kv_cache_mode="cached",
                return_dict=False,
            )[0]
        assert_close(run(artifact, "transformer_cached", later | cached), expected)


def test_references_are_not_ignored(artifact_of: ByFamily) -> None:
    extract, rest = feeds_of(REFERENCES[0], 1)
    without = run(artifact_of("klein-kv"), "transformer", rest)
    remembering = run(artifact_of("klein-kv"), "transformer_cached", rest | extracted(artifact_of("klein-kv"), extract))
    assert np.abs(remembering - without).max() > 0.05 * np.abs(without).max()


def test_a_row_gives_the_same_bits_alone_and_in_a_batch(artifact_of: ByFamily) -> None:
    extract, rest = feeds_of(REFERENCES[1], 3)
    feeds = rest | extracted(artifact_of("klein-kv"), extract)
    together = run(artifact_of("klein-kv"), "transformer_cached", feeds)
    for i in range(3):
        row = extracted(artifact_of("klein-kv"), {name: array[i : i + 1] for name, array in extract.items()})
        assert all(np.array_equal(array[0], feeds[name][i]) for name, array in row.items())
        alone = run(artifact_of("klein-kv"), "transformer_cached", {k: v[i : i + 1] for k, v in feeds.items()})
        assert np.array_equal(alone[0], together[i])


def generate(artifact: Path, embeds: Array, images: list[Image.Image], width: int, height: int, seed: int) -> Array:
    """Run the four steps of Flux2KleinKVPipeline, in minimal form, with only the graphs of an artifact."""
    packed, places = [], []
    for i, image in enumerate(images):
        pixels = np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
        latents = run(artifact, "vae_encoder", {"image": pixels})
        packed.append(latents.reshape(1, 128, -1).transpose(0, 2, 1))
        places.append(grid(10 + 10 * i, *latents.shape[2:]).numpy()[None])
    memory = extracted(artifact, {"ref_hidden_states": np.concatenate(packed, 1), "ref_ids": np.concatenate(places, 1)})
    h, w = height // 16, width // 16
    start = torch.randn(1, 128, h, w, generator=torch.Generator().manual_seed(seed))
    x: Array = start.reshape(1, 128, -1).transpose(1, 2).numpy()
    text = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(TOKENS))
    fixed = {
        "encoder_hidden_states": embeds,
        "img_ids": grid(0, h, w).numpy()[None],
        "txt_ids": text.numpy()[None],
        **memory,
    }
    schedule = sigmas(h * w, 4)
    for now, then in itertools.pairwise(schedule):
        feeds = fixed | {"hidden_states": x, "timestep": np.array([now], np.float32)}
        x = x + (then - now) * run(artifact, "transformer_cached", feeds)
    return run(artifact, "vae_decoder", {"latents": x.transpose(0, 2, 1).reshape(1, 128, h, w)})


@pytest.mark.parametrize("count", [1, 2])
def test_an_image_with_references_is_that_of_diffusers(artifact_of: ByFamily, count: int) -> None:
    pipe = pipeline()
    random = np.random.default_rng(5)
    sizes = [(64, 96), (80, 64)][:count]
    images = [Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for h, w in sizes]
    with torch.no_grad():
        embeds = pipe.encode_prompt("two foxes")[0]
    generated = generate(artifact_of("klein-kv"), embeds.numpy(), images, 96, 64, seed=3)
    expected = pipe(
        image=images,
        prompt="two foxes",
        width=96,
        height=64,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).images
    off = np.abs(generated.astype(int) - (expected * 255).round().astype(int))
    assert off.max() <= 1
    assert (off == 0).mean() >= 0.999


class TestArtifact:
    """The two graphs are in the folder of the plain one and share its weights."""

    @pytest.fixture
    def folder(self, artifact_of: ByFamily) -> Path:
        return artifact_of("klein-kv") / "transformer"

    def initializers(self, folder: Path, graph: str) -> Iterator[onnx.TensorProto]:
        for tensor in onnx.load(folder / graph, load_external_data=False).graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                yield tensor

    def test_all_three_graphs_lie_in_one_folder_beside_one_copy_of_the_weights(self, folder: Path) -> None:
        assert {path.name for path in folder.iterdir()} == {
            "diffusion_pytorch_model.safetensors",
            "model.onnx",
            "model_cached.onnx",
            "model_extract.onnx",
        }
        manifest = verify(folder.parent, kinds=("onnx",))
        assert tuple(manifest.parts) == parts_of(manifest.variant)
        for part in KV_PARTS:
            assert manifest.part(part).ports == ports(part, manifest.variant, "fp32")

    def test_the_extracting_graph_has_no_weight_of_the_text(self, folder: Path) -> None:
        names = {tensor.name for tensor in self.initializers(folder, "model_extract.onnx")}
        assert "x_embedder.weight" in names
        assert not [name for name in names if "context" in name or "add" in name or "txt" in name or "out.li" in name]
        assert "single_transformer_blocks.2.attn.to_qkv_mlp_proj.weight" in names
        assert "single_transformer_blocks.2.attn.to_out.weight" not in names  # the output of the last block is not used

    def test_an_adapter_is_merged_once_for_all_three(self, checkpoint_of: ByFamily, tmp_path: Path) -> None:
        module = "transformer_blocks.0.attn.to_k"
        stored = load_file(checkpoint_of("klein-kv") / "transformer" / "diffusion_pytorch_model.safetensors")
        a, b = noise(4, 64), noise(64, 4)
        adapter = tmp_path / "adapter.safetensors"
        save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, adapter)
        config = ExportConfig(parts=("transformer", *KV_PARTS), loras=(Lora(adapter),))
        made = export(checkpoint_of("klein-kv"), tmp_path / "out", config)
        assert [part.derived_bytes for part in made.parts] == [64 * 64 * 4, 0, 0]
        assert [part.linked_bytes > 0 for part in made.parts] == [True, False, False]
        merged = load_file(tmp_path / "out" / "transformer" / "derived.safetensors")[f"{module}.weight"]
        assert torch.allclose(merged, stored[f"{module}.weight"] + b @ a, atol=1e-5)
        for graph in ("model", "model_cached", "model_extract"):
            weights = {t.name: t for t in self.initializers(tmp_path / "out" / "transformer", f"{graph}.onnx")}
            places = {entry.key: entry.value for entry in weights[f"{module}.weight"].external_data}
            assert places["location"] == "derived.safetensors"
        assert export(checkpoint_of("klein-kv"), tmp_path / "out", config).up_to_date

    def test_one_of_the_two_can_be_exported_alone(self, checkpoint_of: ByFamily, tmp_path: Path) -> None:
        export(checkpoint_of("klein-kv"), tmp_path / "out", ExportConfig(parts=("transformer_extract",)))
        assert list(verify(tmp_path / "out").parts) == ["transformer_extract"]


def test_other_variants_have_neither(checkpoint_of: ByFamily, tmp_path: Path) -> None:
    assert parts_of(VARIANTS["klein-4b"]) == parts_of(VARIANTS["dev"]) == PARTS
    assert set(parts_of(VARIANTS["klein-9b-kv"])) == {*PARTS, *KV_PARTS}
    with pytest.raises(UsageError, match="klein-custom has no transformer_cached; it has: text_encoder, transformer, "):
        export(checkpoint_of("klein"), tmp_path / "out", ExportConfig(parts=("transformer_cached",)))


def test_a_guidance_embedding_is_refused() -> None:
    variant = VARIANTS["klein-9b-kv"]
    other = replace(variant, transformer=replace(variant.transformer, guidance_embeds=True))
    with pytest.raises(
        CheckpointError, match="guidance_embeds is true; no published klein-kv has a guidance embedding"
    ):
        FakePart("transformer_extract", other, "bf16", "matmul")


def test_what_one_graph_gives_the_other_takes() -> None:
    variant = VARIANTS["klein-9b-kv"]
    gives = ports("transformer_extract", variant, "bf16").outputs
    takes = ports("transformer_cached", variant, "bf16").inputs
    assert len(gives) == 2 * (8 + 24)
    assert takes[-len(gives) :] == gives
    assert takes[: -len(gives)] == ports("transformer", variant, "bf16").inputs
    assert gives[0].shape({"batch": 1, "ref_tokens": 4096}) == (1, 32, 4096, 128)
