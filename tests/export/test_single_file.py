"""Single files with black-forest-labs' names give the same graphs as a checkpoint in diffusers layout."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
import torch
from diffusers import Flux2Transformer2DModel
from onnx import helper
from safetensors.torch import load_file, save_file

from export.artifact import ExportConfig, export
from export.lint.lint import lint
from export.lora.merge import merge
from export.lora.terms import Lora
from export.values import read_all
from export.weights import Binding, find
from kit import safetensors_file, tiny
from kit.configs import read_variant
from kit.errors import CheckpointError
from kit.ports import PartName
from kit.variants import Family
from tests.export.bfl import State, to_bfl, to_diffusers

WEIGHTS = "diffusion_pytorch_model.safetensors"
ByFamily = Callable[[Family], Path]
Feeds = dict[str, npt.NDArray[Any]]


def load(checkpoint: Path, part: str = "transformer") -> State:
    loaded: State = load_file(checkpoint / part / WEIGHTS)
    return loaded


def shapes_of(checkpoint: Path, part: str = "transformer") -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in safetensors_file.read_folder(checkpoint / part).items()}


def bind(checkpoint: Path, file: Path) -> Binding:
    return find("transformer", read_variant(checkpoint), checkpoint, shapes_of(checkpoint), file)


def settled(binding: Binding, folder: Path) -> State:
    """Read every weight from where the graph would read it."""
    folder.mkdir(exist_ok=True)
    return {name: torch.from_numpy(read_all(t)) for name, t in binding.settle(folder).tensors.items()}


def session(artifact: Path, part: PartName) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(artifact / part / "model.onnx", options, providers=["CPUExecutionProvider"])


def feeds_of(runner: ort.InferenceSession) -> Feeds:
    """Make noise for every input and small integers for ids."""
    sizes = {"batch": 1, "image_tokens": 16, "latent_height": 4, "latent_width": 4}
    random = np.random.default_rng(0)
    feeds: Feeds = {}
    for port in runner.get_inputs():
        shape = [n if isinstance(n, int) else sizes.get(n, 64) for n in port.shape]
        feeds[port.name] = (
            random.integers(0, 9, shape) if "int64" in port.type else random.random(shape, dtype=np.float32)
        )
    return feeds


def run(runner: ort.InferenceSession, feeds: Feeds) -> npt.NDArray[Any]:
    result: npt.NDArray[Any] = runner.run(None, feeds)[0]
    return result


def reference(checkpoint: Path, state: State, feeds: Feeds) -> npt.NDArray[Any]:
    """Run diffusers' transformer with other weights."""
    model = Flux2Transformer2DModel.from_config(Flux2Transformer2DModel.load_config(checkpoint / "transformer")).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        out = model(**{name: torch.from_numpy(array) for name, array in feeds.items()}, return_dict=False)[0]
    result: npt.NDArray[Any] = out.numpy()
    return result


def fp8(state: State) -> State:
    """Quantize the linear layers of the blocks as in the published FP8 files, and add input scales."""
    made: State = {}
    for name, weight in state.items():
        if weight.ndim == 2 and "_blocks." in name:
            scale = weight.abs().max() / 448
            made[name] = (weight / scale).to(torch.float8_e4m3fn)
            made[f"{name}_scale"] = scale
            made[name.replace(".weight", ".input_scale")] = torch.tensor(0.1)
        else:
            made[name] = weight
    return made


def dequantized(state: State) -> State:
    return {
        name: tensor.float() * state[f"{name}_scale"] if tensor.dtype == torch.float8_e4m3fn else tensor
        for name, tensor in state.items()
        if not name.endswith("_scale")
    }


class TestTransformer:
    """A file that holds only the transformer."""

    @pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
    @pytest.mark.parametrize("family", ["klein", "dev"])
    def test_every_weight_is_a_byte_range_of_the_file_but_the_one_with_swapped_halves(
        self, checkpoint_of: ByFamily, tmp_path: Path, family: Family, prefix: str
    ) -> None:
        state = load(checkpoint_of(family))
        bfl = to_bfl(state)
        assert all(torch.equal(tensor, state[name]) for name, tensor in to_diffusers(bfl).items())
        file = tmp_path / "flux2.safetensors"
        save_file({prefix + name: tensor for name, tensor in bfl.items()}, file)
        binding = bind(checkpoint_of(family), file)
        assert binding.files == [file]
        assert set(binding.derived) == {"norm_out.linear.weight"}
        found = settled(binding, tmp_path / "settled")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())

    def test_the_graph_computes_the_same_to_the_bit(
        self, checkpoint_of: ByFamily, artifact_of: ByFamily, tmp_path: Path
    ) -> None:
        file = tmp_path / "flux2.safetensors"
        save_file(to_bfl(load(checkpoint_of("dev"))), file)
        config = ExportConfig(("transformer",), single_files={"transformer": file})
        made = export(checkpoint_of("dev"), tmp_path / "out", config)
        assert made.parts[0].derived_bytes == 2 * 64 * 64 * 4
        assert (tmp_path / "out" / "transformer" / "flux2.safetensors").samefile(file)
        ours, theirs = session(tmp_path / "out", "transformer"), session(artifact_of("dev"), "transformer")
        assert np.array_equal(run(ours, feeds_of(theirs)), run(theirs, feeds_of(theirs)))
        assert export(checkpoint_of("dev"), tmp_path / "out", config).up_to_date
        file.touch()
        assert not export(checkpoint_of("dev"), tmp_path / "out", config).up_to_date

    def test_fp8_stays_where_it_is_with_its_scale_behind_it(self, checkpoint_of: ByFamily, tmp_path: Path) -> None:
        """The weights are read as FP8 and the graph computes with their dequantized values."""
        checkpoint = checkpoint_of("klein")
        quantized = fp8(to_bfl(load(checkpoint)))
        file = tmp_path / "flux2-fp8.safetensors"
        save_file(quantized, file)
        export(checkpoint, tmp_path / "out", ExportConfig(("transformer",), single_files={"transformer": file}))
        graph = onnx.load(tmp_path / "out" / "transformer" / "model.onnx", load_external_data=False).graph
        held = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT8E4M3FN]
        assert len(held) == 2 * 12 + 3 * 2
        assert all(t.data_location == onnx.TensorProto.EXTERNAL for t in held)
        assert sum(node.op_type == "DequantizeLinear" for node in graph.node) == len(held)
        runner = session(tmp_path / "out", "transformer")
        feeds = feeds_of(runner)
        expected = reference(checkpoint, to_diffusers(dequantized(quantized)), feeds)
        assert np.abs(run(runner, feeds) - expected).max() <= 1e-4 * np.abs(expected).max()
        findings, nodes = lint(tmp_path / "out")
        assert [str(finding) for finding in findings] == []
        assert nodes["transformer"] == len(graph.node)

    def test_fp8_under_a_bf16_graph_is_dequantized_to_bf16_and_passes_the_linter(
        self, checkpoint_of: ByFamily, tmp_path: Path
    ) -> None:
        file = tmp_path / "flux2-fp8.safetensors"
        save_file(fp8(to_bfl(load(checkpoint_of("klein")))), file)
        config = ExportConfig(("transformer",), "bf16", single_files={"transformer": file})
        export(checkpoint_of("klein"), tmp_path / "out", config)
        findings, _ = lint(tmp_path / "out")
        assert [str(finding) for finding in findings] == []
        graph = onnx.load(tmp_path / "out" / "transformer" / "model.onnx", load_external_data=False).graph
        nodes = [node for node in graph.node if node.op_type == "DequantizeLinear"]
        assert len(nodes) == 2 * 12 + 3 * 2
        assert {helper.get_node_attr_value(node, "output_dtype") for node in nodes} == {onnx.TensorProto.BFLOAT16}

    def test_an_adapter_on_fp8_is_added_to_what_it_stands_for_and_stored_in_bf16(
        self, checkpoint_of: ByFamily, tmp_path: Path
    ) -> None:
        checkpoint = checkpoint_of("klein")
        quantized = fp8(to_bfl(load(checkpoint)))
        file = tmp_path / "flux2-fp8.safetensors"
        save_file(quantized, file)
        a, b = torch.randn(2, 64), torch.randn(192, 2)
        module = "double_blocks.1.txt_attn.qkv"
        lora = tmp_path / "lora.safetensors"
        save_file({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, lora)
        binding = merge(bind(checkpoint, file), [Lora(lora)], read_variant(checkpoint).transformer)
        name = "transformer_blocks.1.attn.add_k_proj.weight"
        assert name not in binding.scales
        assert len(binding.scales) == 2 * 12 + 3 * 2 - 3
        exact = (
            dequantized(quantized)[f"{module}.weight"][64:128] + b[64:128] @ a
        )  # another slice sums in another order
        assert torch.equal(settled(binding, tmp_path / "settled")[name], exact.to(torch.bfloat16).float())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("img_in.weight"), r"tensor 'img_in.weight' of shape \[64, 128\] is missing"),
            (lambda s: s.update(extra=torch.ones(1)), "tensor 'extra' is not part of the transformer"),
            (
                lambda s: s.update({"img_in.weight_scale": torch.ones(1)}),
                "tensor 'img_in.weight_scale' is not part of the transformer",
            ),
            (
                lambda s: s.update({"img_in.weight": s["img_in.weight"].T.contiguous()}),
                r"tensor 'img_in.weight' has shape \[128, 64\], the config asks for \[64, 128\]",
            ),
            (
                lambda s: s.update({"double_blocks.0.img_attn.qkv.weight": torch.ones(190, 64)}),
                r"'double_blocks.0.img_attn.qkv.weight' of shape \[190, 64\] is not a stack of queries, keys and "
                "values",
            ),
            (
                lambda s: s.update(fp8(s) | {"img_in.weight": s["img_in.weight"].to(torch.float8_e4m3fn)}),
                "tensor 'img_in.weight' is stored as F8_E4M3 without a weight_scale",
            ),
            (
                lambda s: s.update(
                    {"img_in.weight": s["img_in.weight"].to(torch.float8_e4m3fn), "img_in.weight_scale": torch.ones(64)}
                ),
                r"'img_in.weight_scale' is F32 of shape \[64\]; only FP8 with one scale per tensor",
            ),
            (
                lambda s: s.update(
                    {"img_in.weight": s["img_in.weight"].to(torch.float8_e4m3fn), "img_in.weight_scale": torch.zeros(1)}
                ),
                "'img_in.weight_scale' is 0.0; a scale must be positive and finite",
            ),
            (
                lambda s: s.update({"img_in.weight_scale_2": torch.ones(1)}),
                "'img_in.weight_scale_2' belongs to NVFP4, which cannot be exported; use the BF16 or FP8 file",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused_by_name(
        self, checkpoint_of: ByFamily, tmp_path: Path, change: Callable[[State], object], message: str
    ) -> None:
        state = to_bfl(load(checkpoint_of("klein")))
        change(state)
        file = tmp_path / "flux2.safetensors"
        save_file(state, file)
        with pytest.raises(CheckpointError, match=message):
            bind(checkpoint_of("klein"), file)

    def test_a_truncated_file_is_refused(self, checkpoint_of: ByFamily, tmp_path: Path) -> None:
        file = tmp_path / "flux2.safetensors"
        save_file(to_bfl(load(checkpoint_of("klein"))), file)
        with file.open("r+b") as stream:
            stream.truncate(file.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="flux2.safetensors: truncated: tensor '.*' ends at byte"):
            bind(checkpoint_of("klein"), file)


VAE_RULES = [
    (r"^(quant_conv)", r"encoder.\1"),
    (r"^(post_quant_conv)", r"decoder.\1"),
    (r"conv_norm_out", "norm_out"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"conv_shortcut", "nin_shortcut"),
]


def vae_to_bfl(state: State) -> State:
    """Rename, reverse the order of the decoder's blocks, and turn linears of the attention into 1x1 convolutions."""
    made: State = {}
    for name, tensor in state.items():
        if match := re.match(r"decoder\.up_blocks\.(\d)\.(?:(resnets)|upsamplers\.0)\.(.*)", name):
            kind = f"block.{match[3]}" if match[2] else f"upsample.{match[3]}"
            made[f"decoder.up.{3 - int(match[1])}.{kind.replace('conv_shortcut', 'nin_shortcut')}"] = tensor
            continue
        renamed = name
        for pattern, replacement in VAE_RULES:
            renamed = re.sub(pattern, replacement, renamed)
        made[renamed] = tensor[:, :, None, None] if ".attn_1." in renamed and tensor.ndim == 2 else tensor
    return {name: tensor.contiguous() for name, tensor in made.items()}


def test_a_vae_file_gives_the_same_images_to_the_bit(
    checkpoint_of: ByFamily, artifact_of: ByFamily, tmp_path: Path
) -> None:
    file = tmp_path / "ae.safetensors"
    save_file(vae_to_bfl(load(checkpoint_of("klein"), "vae")), file)
    parts: tuple[PartName, ...] = ("vae_encoder", "vae_decoder")
    made = export(checkpoint_of("klein"), tmp_path / "out", ExportConfig(parts, single_files={"vae": file}))
    assert made.facts()["derived_bytes"] == 0
    for part in parts:
        ours, theirs = session(tmp_path / "out", part), session(artifact_of("klein"), part)
        assert np.array_equal(run(ours, feeds_of(theirs)), run(theirs, feeds_of(theirs)))


@pytest.mark.parametrize("small", [False, True])
def test_a_vae_file_is_found_whole(tmp_path: Path, small: bool) -> None:
    checkpoint = tiny.save(tmp_path / "checkpoint", tiny.Tiny(text_tokens=64, small_decoder=small))
    state = load(checkpoint, "vae")
    file = tmp_path / "ae.safetensors"
    save_file({f"vae.{name}": tensor for name, tensor in vae_to_bfl(state).items()}, file)
    shapes = {n: s for n, s in shapes_of(checkpoint, "vae").items() if n.startswith(("decoder", "post", "bn.running"))}
    binding = find("vae_decoder", read_variant(checkpoint), checkpoint, shapes, file)
    found = settled(binding, tmp_path / "settled")
    assert found.keys() == shapes.keys()
    assert all(torch.equal(found[name], state[name]) for name in shapes)
