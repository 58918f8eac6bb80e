"""Every form of checkpoint that people bring gives the weights it stands for, or is refused by names in its files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.artifact import ExportConfig, export
from export.sources import find_sources
from export.torch_part import bind, tensors
from kit.configs import read_variant
from kit.errors import CheckpointError
from kit.ports import PartName
from tests.conftest import ByFamily
from tests.export.bfl import State, to_bfl
from tests.export.test_single_file import vae_to_bfl

DIT, VAE, TEXT = "model.diffusion_model.", "vae.", "text_encoders.qwen3_4b.transformer."
FOLDERS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: ByFamily) -> Path:
    return checkpoint_of("klein")


def load(checkpoint: Path, folder: str = "transformer") -> State:
    loaded: State = load_file(checkpoint / folder / f"{FOLDERS[folder]}.safetensors")
    return loaded


def read(part: PartName, checkpoint: Path, file: Path | None = None, weights: str | None = None) -> State:
    """Return the values of every weight that the graph of a part would compute with."""
    binding = bind(part, read_variant(checkpoint), checkpoint, file, weights=weights)
    return {name: tensor.float().clone() for name, tensor in tensors(binding)}


def quantize(state: State, scale_word: str | None, dtype: torch.dtype = torch.float8_e4m3fn, prefix: str = "") -> State:
    """Quantize every matrix inside a block; `scale_word` None: cast without scales."""
    made: State = {}
    for name, weight in state.items():
        if weight.ndim != 2 or not ("_blocks." in name or "layers." in name):
            made[prefix + name] = weight
            continue
        scale = (weight.abs().max() / torch.finfo(dtype).max) if scale_word else torch.ones(())
        made[prefix + name] = (weight / scale).to(dtype)
        if scale_word:
            made[prefix + name.removesuffix("weight") + scale_word] = scale.reshape(1).to(torch.float32)
    return made


def meaning(state: State, *words: str) -> State:
    """Return the numbers that a quantized state stands for."""
    found = {}
    for name, tensor in state.items():
        scale = next((state[k] for w in words if (k := name.removesuffix("weight") + w) in state), torch.ones(1))
        if name.endswith(("weight", "scale")) and tensor.dtype != torch.uint8:
            found[name] = tensor.float() * (scale.float().reshape(()) if "float8" in str(tensor.dtype) else 1.0)
    return found


def marker(fmt: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": fmt}).encode()), dtype=torch.uint8)


def comfy(state: State) -> State:
    """Write scales as ComfyUI did before it had markers per layer."""
    made = quantize(state, "scale_weight")
    inputs = {k.replace("scale_weight", "scale_input"): torch.ones(1) for k in made if k.endswith("scale_weight")}
    return made | inputs | {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}


def comfy_marked(state: State) -> State:
    made = quantize(state, "weight_scale")
    names = [k.removesuffix("weight_scale") for k in made if k.endswith("weight_scale")]
    return made | {f"{name}comfy_quant": marker("float8_e4m3fn") for name in names}


# The forms of docs/accepted.md, by the names there: what is written for the transformer.
FP8_FORMS: dict[str, Callable[[State], State]] = {
    "FP8, weight_scale": lambda s: quantize(s, "weight_scale"),
    "FP8, scale_weight and scaled_fp8": comfy,
    "FP8, comfy_quant markers": comfy_marked,
    "FP8, cast without scales": lambda s: quantize(s, None),
    "FP8 in E5M2": lambda s: quantize(s, "weight_scale", torch.float8_e5m2),
    "FP8, scales in bf16": lambda s: {
        k: t.to(torch.bfloat16) if k.endswith("weight_scale") else t for k, t in quantize(s, "weight_scale").items()
    },
}


@pytest.mark.parametrize("prefix", ["", DIT])
@pytest.mark.parametrize("form", FP8_FORMS)
def test_fp8_single_files_are_read(checkpoint: Path, tmp_path: Path, form: str, prefix: str) -> None:
    written = FP8_FORMS[form](to_bfl(load(checkpoint)))
    save_file({prefix + name: tensor for name, tensor in written.items()}, tmp_path / "a.safetensors")
    plain = meaning(written, "weight_scale", "scale_weight")
    kept = {k: t for k, t in plain.items() if not k.endswith(("weight_scale", "scale_weight", "_input"))}
    save_file(kept, tmp_path / "plain.safetensors")
    assert_same(
        read("transformer", checkpoint, tmp_path / "a.safetensors"),
        read("transformer", checkpoint, tmp_path / "plain.safetensors"),
    )


def assert_same(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        step = 2.0**-8 * tensor.abs().max()  # bf16, in which E5M2 with a scale is written
        assert (found[name] - tensor).abs().max() <= step, name


def test_scales_of_one_that_are_assumed_are_said(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(quantize(to_bfl(load(checkpoint)), None), tmp_path / "a.safetensors")
    with caplog.at_level(logging.WARNING):
        read("transformer", checkpoint, tmp_path / "a.safetensors")
    assert "FP8 tensors have no scales and are read as plain numbers (scale 1)" in caplog.text


def test_fp8_with_a_list_of_layers_in_the_header_is_read(checkpoint: Path, tmp_path: Path) -> None:
    made = quantize(to_bfl(load(checkpoint)), "weight_scale")
    layers = {k.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"} for k in made if k.endswith("weight_scale")}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(made, tmp_path / "a.safetensors", metadata=header)
    assert read("transformer", checkpoint, tmp_path / "a.safetensors")
    header = {"_quantization_metadata": json.dumps({"layers": {"img_in": {"format": "nvfp4"}}})}
    save_file(made, tmp_path / "b.safetensors", metadata=header)
    with pytest.raises(CheckpointError, match="_quantization_metadata: 'img_in' is stored in NVFP4, which cannot be"):
        read("transformer", checkpoint, tmp_path / "b.safetensors")


@pytest.mark.parametrize("folder", ["transformer", "text_encoder"])
def test_fp8_in_a_folder_is_read(checkpoint: Path, tmp_path: Path, folder: PartName) -> None:
    own = shutil.copytree(checkpoint, tmp_path / "own")
    path = own / folder / f"{FOLDERS[folder]}.safetensors"
    written = quantize(load(checkpoint, folder), "weight_scale")
    save_file(written, path)
    found = read(folder, own)
    save_file({k: t for k, t in meaning(written, "weight_scale").items() if not k.endswith("_scale")}, path)
    assert_same(found, read(folder, own))


@pytest.fixture(scope="module")
def everything(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write an all-in-one file."""
    made = {DIT + k: t for k, t in to_bfl(load(checkpoint)).items()}
    made |= {VAE + k: t for k, t in vae_to_bfl(load(checkpoint, "vae")).items()}
    made |= {TEXT + k: t for k, t in load(checkpoint, "text_encoder").items()}
    made[TEXT + "tekken_model"] = torch.zeros(4, dtype=torch.uint8)
    file = tmp_path_factory.mktemp("all") / "all in one.safetensors"
    save_file({k: t.contiguous() for k, t in made.items()}, file)
    return file


@pytest.mark.parametrize("part", ["transformer", "text_encoder", "vae_encoder", "vae_decoder"])
def test_an_all_in_one_file_gives_each_part(checkpoint: Path, everything: Path, part: PartName) -> None:
    found, expected = read(part, checkpoint, everything), read(part, checkpoint)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def single(change: Callable[[State], object], name: str = "a.safetensors") -> Callable[[Path, Path], Path]:
    """Write a transformer in one file with a change."""

    def write(checkpoint: Path, folder: Path) -> Path:
        state = {DIT + k: t for k, t in to_bfl(load(checkpoint)).items()}
        change(state)
        save_file({k: t.contiguous() for k, t in state.items()}, folder / name)
        return folder / name

    return write


def raw(content: bytes) -> Callable[[Path, Path], Path]:
    def write(checkpoint: Path, folder: Path) -> Path:
        (folder / "a.safetensors").write_bytes(content)
        return folder / "a.safetensors"

    return write


QKV = DIT + "double_blocks.0.img_attn.qkv"
# The refusals of docs/accepted.md, by the names there.
REFUSED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "one tensor with and without a prefix": (
        single(lambda s: s.update({"img_in.weight": s[f"{DIT}img_in.weight"] + 1})),
        f"'img_in.weight' and '{DIT}img_in.weight' are the same tensor of the transformer",
    ),
    "one tensor under the names of both": (
        single(lambda s: s.update({f"{DIT}x_embedder.weight": s[f"{DIT}img_in.weight"] + 1})),
        f"'{DIT}(img_in|x_embedder).weight' and '{DIT}(img_in|x_embedder).weight' are the same tensor",
    ),
    "a tensor that is missing": (single(lambda s: s.pop(f"{QKV}.weight")), "'double_blocks.0.img_attn.qkv.weight' of"),
    "a tensor of another shape": (
        single(lambda s: s.update({f"{DIT}img_in.weight": torch.ones(3, 3)})),
        rf"tensor '{DIT}img_in.weight' has shape \[3, 3\], the config asks for \[64, 128\]",
    ),
    "an unknown tensor": (
        single(lambda s: s.update({f"{DIT}extra": torch.ones(1)})),
        f"tensor '{DIT}extra' is not part of the transformer",
    ),
    "NVFP4": (single(lambda s: s.update({f"{QKV}.weight_scale_2": torch.ones(1)})), "belongs to NVFP4"),
    "NVFP4, comfy_quant": (single(lambda s: s.update({f"{QKV}.comfy_quant": marker("nvfp4")})), "is stored in NVFP4"),
    "int8 tensor-wise": (
        single(
            lambda s: s.update(
                {f"{QKV}.weight": s[f"{QKV}.weight"].to(torch.int8), f"{QKV}.weight_scale": torch.ones(1)}
            )
        ),
        f"'{QKV}.weight' is stored in int8 tensor-wise",
    ),
    "FP8 with a scale per row": (
        single(
            lambda s: s.update(
                {f"{QKV}.weight": s[f"{QKV}.weight"].to(torch.float8_e4m3fn), f"{QKV}.weight_scale": torch.ones(192)}
            )
        ),
        rf"'{QKV}.weight_scale' is F32 of shape \[192\]; only FP8 with one scale per tensor",
    ),
    "FP8 with a scale per block": (
        single(lambda s: s.update({f"{QKV}.weight_scale_inv": torch.ones(2, 2)})),
        "per block",
    ),
    "bitsandbytes": (
        single(lambda s: s.update({f"{QKV}.weight.quant_state.bitsandbytes__nf4": torch.ones(1)})),
        "belongs to bitsandbytes",
    ),
    "Nunchaku": (single(lambda s: s.update({f"{QKV}.wscales": torch.ones(1)})), "belongs to Nunchaku"),
    "torchao": (single(lambda s: s.update({f"{QKV}._weight_qdata": torch.ones(1)})), "belongs to torchao"),
    "GGUF": (raw(b"GGUF\3\0\0\0" + bytes(64)), "is a GGUF file"),
    "pickle": (raw(b"PK\3\4" + bytes(64)), "is a pickle"),
    "pickle, older": (raw(b"\x80\2}q\0" + bytes(64)), "is a pickle"),
    "Git LFS pointer": (raw(b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_what_is_not_read_is_named(checkpoint: Path, tmp_path: Path, form: str) -> None:
    write, message = REFUSED[form]
    file = write(checkpoint, tmp_path)
    with pytest.raises(CheckpointError, match=message) as refusal:
        read("transformer", checkpoint, file)
    assert str(refusal.value).startswith(str(file))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            "quantized with bitsandbytes, which cannot be exported",
        ),
        ({"quant_method": "torchao"}, "quantized with torchao"),
        ({"quant_type": "gguf"}, "quantized with GGUF"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quantized with 'fp8'"),
        ("x", "quantization_config is 'x'; expected an object"),
    ],
)
def test_a_quantization_in_a_config_is_named_first(
    checkpoint: Path, tmp_path: Path, config: object, message: str
) -> None:
    own = shutil.copytree(checkpoint, tmp_path / "own")
    path = own / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    with pytest.raises(CheckpointError, match=message):
        read("transformer", own)


def test_a_file_without_the_part_says_what_it_holds(checkpoint: Path, tmp_path: Path) -> None:
    save_file({VAE + k: t for k, t in load(checkpoint, "vae").items()}, tmp_path / "vae.safetensors")
    with pytest.raises(CheckpointError, match="vae.safetensors: holds no transformer; it has: vae"):
        read("transformer", checkpoint, tmp_path / "vae.safetensors")


def test_a_language_model_with_and_without_its_prefix_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    state = load(checkpoint, "text_encoder")
    name = "layers.0.input_layernorm.weight"
    save_file(state | {name: state[f"model.{name}"] + 1}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=rf"'(model\.)?{name}' and '(model\.)?{name}' are the same tensor"):
        read("text_encoder", checkpoint, tmp_path / "a.safetensors")


@pytest.mark.parametrize(("content", "name"), [(b"GGUF\3\0\0\0", "a GGUF file"), (b"PK\3\4aaaa", "a pickle")])
def test_a_checkpoint_in_another_format_is_named_before_anything_is_asked_for(
    tmp_path: Path, content: bytes, name: str
) -> None:
    (tmp_path / "flux2.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"flux2.gguf: is {name}"):
        find_sources(str(tmp_path / "flux2.gguf"), ("transformer",))


class TestVariants:
    """Folders whose files have a variant in their names."""

    @pytest.fixture
    def own(self, checkpoint: Path, tmp_path: Path) -> Path:
        return shutil.copytree(checkpoint, tmp_path / "own")

    def rename(self, own: Path, *variants: str) -> Path:
        """Give the transformer's file the names of variants; returns the checkpoint."""
        path = own / "transformer" / "diffusion_pytorch_model.safetensors"
        for variant in variants:
            shutil.copyfile(path, path.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
        path.unlink()
        return own

    def test_the_one_there_is_read(self, own: Path, checkpoint: Path) -> None:
        assert read("transformer", self.rename(own, "bf16")).keys() == read("transformer", checkpoint).keys()

    def test_several_must_be_chosen_from(self, own: Path) -> None:
        self.rename(own, "bf16", "fp16")
        with pytest.raises(CheckpointError, match="several variants; choose one with --variant bf16 or fp16"):
            read("transformer", own)
        assert read("transformer", own, weights="fp16")
        with pytest.raises(CheckpointError, match="has no variant 'fp8'; there are: bf16, fp16"):
            read("transformer", own, weights="fp8")

    def test_shards_of_a_variant_are_read(self, own: Path, checkpoint: Path) -> None:
        folder = own / "transformer"
        path = folder / "diffusion_pytorch_model.safetensors"
        shard = "diffusion_pytorch_model.bf16-00001-of-00001.safetensors"
        index = {"weight_map": dict.fromkeys(load_file(path), shard)}
        path.rename(folder / shard)
        (folder / "diffusion_pytorch_model.safetensors.index.bf16.json").write_text(json.dumps(index))
        assert read("transformer", own).keys() == read("transformer", checkpoint).keys()

    def test_without_a_choice_the_files_without_a_variant_are_read(self, own: Path) -> None:
        (own / "transformer" / "diffusion_pytorch_model.bf16.safetensors").write_bytes(b"")
        assert read("transformer", own)


class TestTokenizer:
    """What a server needs is checked by the export."""

    def test_it_is_needed_with_the_text_encoder_only(self, checkpoint: Path, tmp_path: Path) -> None:
        own = shutil.copytree(checkpoint, tmp_path / "own")
        shutil.rmtree(own / "tokenizer")
        with pytest.raises(CheckpointError, match="own/tokenizer/tokenizer.json: missing; prompts cannot be encoded"):
            export(own, tmp_path / "out", ExportConfig(("text_encoder",)))
        assert not (tmp_path / "out").exists()
        assert export(own, tmp_path / "out", ExportConfig(("transformer",))).parts

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: (f / "tokenizer.json").rename(f / "vocab.json"), "vocab.json is in an older format"),
            (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: not valid JSON"),
            (lambda f: (f / "tokenizer.json").write_text("{}"), "is not a tokenizer"),
            (lambda f: (f / "chat_template.jinja").unlink(), "has no chat template"),
        ],
    )
    def test_what_a_server_could_not_use_is_refused(
        self, checkpoint: Path, tmp_path: Path, change: Callable[[Path], object], message: str
    ) -> None:
        own = shutil.copytree(checkpoint, tmp_path / "own")
        change(own / "tokenizer")
        with pytest.raises(CheckpointError, match=message):
            export(own, tmp_path / "out", ExportConfig(("text_encoder",)))
