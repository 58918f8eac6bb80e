"""No key of an adapter is silently ignored: a key that cannot be applied is reported before anything is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from export.artifact import ExportConfig, export
from export.lora.merge import merge
from export.lora.terms import Lora
from export.weights import Binding, find
from kit import safetensors_file, tiny
from kit.configs import read_variant
from kit.errors import CheckpointError, UsageError
from tests.export.bfl import State

MODULE = "transformer_blocks.0.attn.to_q"
A, B = f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight"
Change = Callable[[State], object]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("refused") / "checkpoint", tiny.Tiny(text_tokens=64))


def good() -> State:
    return {A: torch.randn(4, 64), B: torch.randn(64, 4)}


def bind(checkpoint: Path, file: Path) -> Binding:
    variant = read_variant(checkpoint)
    shapes = {name: tensor.shape for name, tensor in safetensors_file.read_folder(checkpoint / "transformer").items()}
    return merge(find("transformer", variant, checkpoint, shapes), [Lora(file)], variant.transformer)


def put(module: str, rows: int = 64, columns: int = 64) -> Change:
    return lambda state: state.update(
        {f"{module}.lora_A.weight": torch.ones(2, columns), f"{module}.lora_B.weight": torch.ones(rows, 2)}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update({f"{MODULE}.dora_scale": torch.ones(64)}), r"cannot apply '.*dora_scale': a DoRA rescales"),
        (lambda s: s.update({f"{MODULE}.lora_magnitude_vector": torch.ones(64)}), "a DoRA rescales .* plain LoRA"),
        (
            put("text_encoder.model.layers.0.self_attn.q_proj"),
            r"'text_encoder.model.layers.0.self_attn.q_proj.lora_A.weight', .* changes the text encoder",
        ),
        (put("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "the adapter changes the text encoder"),
        (put("transformer_blocks.2.attn.to_q"), r"'transformer_blocks.2.attn.to_q.lora_A.weight', .* no such linear"),
        (put("guidance_in.in_layer"), "the transformer of this variant has no such linear"),
        (
            lambda s: [put(f"double_blocks.{i}.img_attn.qkv")(s) for i in (7, 8)],
            r"'double_blocks.7.img_attn.qkv.lora_A.weight', .* and 1 more: the transformer of this variant",
        ),
        (
            lambda s: s.update({f"{MODULE}.diff_b": torch.ones(64)}),
            r"'.*to_q.diff_b': the linear layers of FLUX.2 have no bias",
        ),
        (
            lambda s: s.update({f"{MODULE}.lora_B.bias": torch.ones(64)}),
            r"'.*lora_B.bias': the linear layers of FLUX.2 have no bias",
        ),
        (
            lambda s: s.update({f"{MODULE}.hada_w1_a": torch.ones(64, 4)}),
            f"{MODULE}: has factors of a LoRA and of a LoHa, so its effect is ambiguous; keep one of them",
        ),
        (
            lambda s: s.update({f"{MODULE}.oft_blocks": torch.ones(4, 4)}),
            r"'.*oft_blocks': not a LoRA, LoHa or LoKr factor and not a full difference; convert the adapter",
        ),
        (lambda s: s.pop(A), f"{MODULE}: lacks A, has B"),
        (lambda s: s.pop(B), f"{MODULE}: lacks B, has A"),
        (lambda s: (s.clear(), s.update({f"{MODULE}.alpha": torch.ones(())})), f"{MODULE}: has alpha but no factors"),
        (lambda s: s.clear(), "holds no tensors, so it is not an adapter"),
        (
            lambda s: s.update({B: torch.ones(64, 5)}),
            r"'.*lora_B.weight' \[64, 5\] and '.*lora_A.weight' \[4, 64\] cannot be multiplied",
        ),
        (lambda s: s.update({A: torch.ones(4, 63)}), r"the factors have shape \[64, 63\], the weight \[64, 64\]"),
        (put("double_blocks.0.img_attn.qkv"), r"qkv: the factors have shape \[64, 64\], the weight \[192, 64\]"),
        (lambda s: s.update({A: torch.ones(0, 64), B: torch.ones(64, 0)}), f"{MODULE}: has rank 0"),
        (lambda s: s.update({A: torch.ones(4, 64, 1, 1)}), r"lora_A.weight' has shape \[4, 64, 1, 1\], not a matrix"),
        (lambda s: s.update({A: torch.ones(4, 64, dtype=torch.int8)}), "is stored as I8; expected F32, F16, BF16"),
        (
            lambda s: s.update({f"{MODULE}.alpha": torch.tensor(math.nan)}),
            f"alpha '{MODULE}.alpha' is nan, not a finite number",
        ),
        (lambda s: s.update({f"{MODULE}.alpha": torch.ones(2)}), r"alpha '.*' has shape \[2\], not one number"),
        (
            lambda s: s.update({f"transformer.{MODULE}.lora_down.weight": torch.ones(4, 64)}),
            f"keys '.*{MODULE}.lora_.*' and '.*{MODULE}.lora_.*' are the same factor",
        ),
        (
            lambda s: (s.clear(), s.update({f"{MODULE}.lokr_w1": torch.ones(8, 8)})),
            "a LoKr needs lokr_w2, or lokr_w2_a and lokr_w2_b; the file has none",
        ),
        (
            lambda s: (
                s.clear(),
                s.update({f"{MODULE}.lokr_w1": torch.ones(8, 8), f"{MODULE}.lokr_w2_a": torch.ones(8, 2)}),
            ),
            "a LoKr needs lokr_w2, or lokr_w2_a and lokr_w2_b; the file has lokr_w2_a",
        ),
        (
            lambda s: (
                s.clear(),
                s.update(
                    {
                        f"{MODULE}.lokr_w1_a": torch.ones(8, 2),
                        f"{MODULE}.lokr_w1_b": torch.ones(2, 8),
                        f"{MODULE}.lokr_w2_a": torch.ones(8, 3),
                        f"{MODULE}.lokr_w2_b": torch.ones(3, 8),
                    }
                ),
            ),
            r"the two sides of the LoKr have ranks \[2, 3\], so alpha / rank is undefined",
        ),
    ],
)
def test_what_cannot_be_applied_is_refused_with_the_key_and_the_reason(
    checkpoint: Path, tmp_path: Path, change: Change, message: str
) -> None:
    state = good()
    change(state)
    file = tmp_path / "adapter.safetensors"
    save_file(state, file)
    with pytest.raises(UsageError, match=message) as refusal:
        bind(checkpoint, file)
    assert str(refusal.value).startswith(str(file))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "lora_adapter_metadata: not valid JSON"),
        ("[]", "lora_adapter_metadata: expected a JSON object, found list"),
        (json.dumps({"transformer.lora_alpha": "8"}), "lora_alpha is '8', not a finite number"),
        (json.dumps({"lora_alpha": math.inf}), "lora_alpha is inf, not a finite number"),
        (json.dumps({"lora_alpha": 8, "alpha_pattern": [1]}), "alpha_pattern is not a JSON object"),
        (json.dumps({"lora_alpha": 8, "alpha_pattern": {"(": 1}}), r"alpha_pattern '\(' is not a regular expression"),
        (json.dumps({"lora_alpha": 8, "alpha_pattern": {"to_q": None}}), "alpha of 'to_q' is None, not a finite"),
        (json.dumps({"alpha_pattern": {"to_q": 1}}), "has alpha_pattern but no lora_alpha"),
        (json.dumps({"peft_type": "LOHA"}), "peft_type 'LOHA' cannot be merged; only LORA is supported"),
        (json.dumps({"lora_alpha": 8, "use_dora": True}), "use_dora is set, which cannot be merged"),
        (json.dumps({"lora_alpha": 8, "fan_in_fan_out": True}), "fan_in_fan_out is set, which cannot be merged"),
    ],
)
def test_settings_that_make_no_sense_are_refused(checkpoint: Path, tmp_path: Path, header: str, message: str) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file(good(), file, metadata={"lora_adapter_metadata": header})
    with pytest.raises(UsageError, match=message):
        bind(checkpoint, file)


def test_settings_of_a_lora_do_not_fit_a_lokr(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    state = {f"{MODULE}.lokr_w1": torch.ones(8, 8), f"{MODULE}.lokr_w2": torch.ones(8, 8)}
    save_file(state, file, metadata={"lora_adapter_metadata": json.dumps({"lora_alpha": 8})})
    with pytest.raises(UsageError, match="settings of a LoRA, but '.*to_q' is not one"):
        bind(checkpoint, file)


def test_a_truncated_adapter_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "adapter.safetensors"
    save_file(good(), file)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="adapter.safetensors: truncated: tensor '.*' ends at byte"):
        bind(checkpoint, file)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sum_that_is_not_finite_is_refused_and_leaves_nothing(checkpoint: Path, tmp_path: Path, value: float) -> None:
    state = good()
    state[A][1, 2] = value
    file = tmp_path / "adapter.safetensors"
    save_file(state, file)
    with pytest.raises(CheckpointError, match=f"adding it to tensor '{MODULE}.weight' gives values that are not"):
        export(checkpoint, tmp_path / "out", ExportConfig(("transformer",), loras=(Lora(file),)))
    assert [path.name for path in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_a_sum_beyond_the_range_of_f16_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    stored = safetensors_file.read_folder(checkpoint / "transformer")
    save_file({name: torch.ones(tensor.shape, dtype=torch.float16) for name, tensor in stored.items()}, half)
    file = tmp_path / "adapter.safetensors"
    save_file({A: torch.full((4, 64), 300.0), B: torch.full((64, 4), 300.0)}, file)
    variant = read_variant(checkpoint)
    base = find("transformer", variant, checkpoint, {n: t.shape for n, t in stored.items()}, half)
    with pytest.raises(CheckpointError, match=f"adapter.safetensors: adding it to tensor '{MODULE}.weight' exceeds"):
        merge(base, [Lora(file)], variant.transformer).settle(tmp_path)


class TestLoraOption:
    """--lora FILE[=WEIGHT]."""

    def test_weight_is_one_when_none_is_given(self, tmp_path: Path) -> None:
        file = tmp_path / "a.safetensors"
        file.touch()
        assert Lora.parse(str(file)) == Lora(file, 1.0)
        assert Lora.parse(f"{file}=0.8") == Lora(file, 0.8)
        assert Lora.parse(f"{file}=-1e-1") == Lora(file, -0.1)

    def test_a_folder_of_peft_or_diffusers_stands_for_its_file(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="a folder without adapter_model.safetensors or pytorch_lora_weights"):
            Lora.parse(str(tmp_path))
        file = tmp_path / "adapter_model.safetensors"
        file.touch()
        assert Lora.parse(str(tmp_path)) == Lora(file, 1.0)
        assert Lora.parse(f"{tmp_path}=0.5") == Lora(file, 0.5)

    def test_a_name_with_an_equals_sign_is_taken_as_it_is_when_it_exists(self, tmp_path: Path) -> None:
        file = tmp_path / "step=100"
        file.touch()
        assert Lora.parse(str(file)) == Lora(file, 1.0)
        assert Lora.parse(f"{file}=2") == Lora(file, 2.0)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a.safetensors=strong", "--lora a.safetensors=strong: weight 'strong' is not a number; write FILE=0.8"),
            ("a.safetensors=", "weight '' is not a number"),
            ("a.safetensors=nan", "weight 'nan' is not finite"),
            ("a.safetensors=0.5", "a.safetensors is not a file"),
            ("a.safetensors", "--lora a.safetensors: a.safetensors is not a file"),
        ],
    )
    def test_what_makes_no_sense_is_refused(self, text: str, message: str) -> None:
        with pytest.raises(UsageError, match=message):
            Lora.parse(text)

    def test_an_export_without_the_transformer_has_nothing_to_merge_into(
        self, checkpoint: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "adapter.safetensors"
        save_file(good(), file)
        with pytest.raises(UsageError, match="--lora changes the transformer, which --parts leaves out"):
            export(checkpoint, tmp_path / "out", ExportConfig(("vae_decoder",), loras=(Lora(file),)))
