"""Every style of adapter file that people bring is merged exactly, or refused with the key and the cure."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from export.lora.merge import check_parts, merge
from export.lora.names import find_spot
from export.lora.terms import Lora
from export.names import all_linears
from export.values import read_all
from export.weights import find
from kit import safetensors_file
from kit.configs import read_variant
from kit.errors import UsageError
from kit.variants import VARIANTS
from tests.conftest import ByFamily
from tests.export.lora_files import ACCEPTED, BFL_QKV, DIM, Case, Q, State, fused, noise, pair, plain, with_config

FIELD = Path(__file__).parents[3] / "shared/field/lora"  # beside the repository, if it is there


@pytest.fixture(scope="module")
def checkpoint(checkpoint_of: ByFamily) -> Path:
    return checkpoint_of("klein")


@pytest.fixture(scope="module")
def base(checkpoint: Path) -> State:
    loaded: State = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    return loaded


def merged(checkpoint: Path, folder: Path, *loras: Lora) -> State:
    """Merge adapters and read every weight of the transformer from where the graph would read it."""
    variant = read_variant(checkpoint)
    shapes = {name: tensor.shape for name, tensor in safetensors_file.read_folder(checkpoint / "transformer").items()}
    settled = merge(find("transformer", variant, checkpoint, shapes), loras, variant).settle(folder)
    return {name: torch.from_numpy(read_all(tensor)) for name, tensor in settled.tensors.items()}


def assert_added(found: State, base: State, truth: State, weight: float = 1.0) -> None:
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        expected = (
            tensor + weight * truth[name.removesuffix(".weight")] if name.removesuffix(".weight") in truth else tensor
        )
        off = (found[name] - expected).abs()
        assert off.max() <= 1e-5, f"{name}: max {off.max():.2e}, mean {off.mean():.2e}"


@pytest.mark.parametrize("style", ACCEPTED)
def test_the_merged_weights_are_the_base_plus_what_the_file_means(
    checkpoint: Path, base: State, tmp_path: Path, style: str
) -> None:
    case = ACCEPTED[style]()
    file = case.write(tmp_path / "lora", "my style.safetensors")
    assert_added(merged(checkpoint, tmp_path, Lora(file, 0.5)), base, case.truth, 0.5)


def spoil(style: str, **tensors: torch.Tensor) -> Case:
    case = ACCEPTED[style]()
    return replace(case, tensors=case.tensors | tensors)


# The refusals of docs/accepted.md, by the names there, with what the message must say.
REFUSED: dict[str, tuple[Callable[[], Case], str]] = {
    "a pattern that matches nothing": (
        lambda: with_config(plain(Q), 1.0, lora_alpha=4, alpha_pattern={"double_blocks.1.img_attn.qkv": 8}),
        r"adapter_config.json: alpha_pattern 'double_blocks.1.img_attn.qkv' matches no module of the adapter",
    ),
    "a rank pattern that matches nothing": (
        lambda: with_config(plain(Q), 1.0, lora_alpha=4, rank_pattern={"to_qq": 8}),
        "rank_pattern 'to_qq' matches no module",
    ),
    "a rank that is not the file's": (
        lambda: with_config(plain(Q), 1.0, lora_alpha=4, r=16),
        "gives rank 16 for '.*to_q', whose factors have rank 4; the settings belong to another file",
    ),
    "PiSSA": (
        lambda: with_config(plain(Q), 1.0, lora_alpha=4, init_lora_weights="pissa_niter_16"),
        "init_lora_weights is 'pissa_niter_16', which changed the base weights .* convert the adapter to a plain LoRA",
    ),
    "OLoRA": (
        lambda: with_config(plain(Q), 1.0, lora_alpha=4, init_lora_weights="olora"),
        "init_lora_weights is 'olora', which changed the base weights",
    ),
    "an unknown initialization": (
        lambda: with_config(plain(Q), 1.0, lora_alpha=4, init_lora_weights="next_year"),
        "init_lora_weights is 'next_year', which the kit does not know",
    ),
    "an unknown setting": (
        lambda: with_config(plain(Q), 1.0, lora_alpha=4, use_shiny=True),
        "adapter_config.json: use_shiny is True, and the kit does not know .* convert the adapter to a plain LoRA",
    ),
    "an unknown setting in diffusers' header": (
        lambda: replace(
            plain(Q), metadata={"lora_adapter_metadata": json.dumps({"transformer.layer_replication": [[0, 1]]})}
        ),
        r"lora_adapter_metadata: layer_replication is \[\[0, 1\]\], and the kit does not know",
    ),
    "a setting given twice": (
        lambda: replace(
            plain(Q), metadata={"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8, "lora_alpha": 4})}
        ),
        "'lora_alpha' is given twice, as 8 and 4",
    ),
    "two adapters": (
        lambda: replace(
            plain(Q, down="lora_A.one", up="lora_B.one"),
            tensors=plain(Q, down="lora_A.one", up="lora_B.one").tensors
            | plain(Q.replace("_q", "_k"), down="lora_A.two", up="lora_B.two").tensors,
        ),
        r"'.*lora_A.two.weight' and '.*lora_A.one.weight' belong to different adapters",
    ),
    "one factor under two names": (
        lambda: spoil("ai-toolkit", **{f"transformer.{BFL_QKV}.lora_A.weight": noise(4, DIM)}),
        f"keys 'diffusion_model.{BFL_QKV}.lora_A.weight' and 'transformer.{BFL_QKV}.lora_A.weight' are the same factor",
    ),
    "one weight under two names": (
        lambda: spoil("ai-toolkit", **plain(f"transformer.{Q}").tensors),
        f"'diffusion_model.{BFL_QKV}' and 'transformer.{Q}' both change '{Q}.weight'",
    ),
    "a whole matrix and one of its parts": (
        lambda: spoil("ai-toolkit", **plain(f"diffusion_model.{BFL_QKV}.1").tensors),
        f"'diffusion_model.{BFL_QKV}' and 'diffusion_model.{BFL_QKV}.1' both change",
    ),
    "a part of the wrong height": (
        lambda: plain("single_blocks.0.linear1.3"),
        r"shape \[64, 64\], which is not part 3 of 'single_blocks.0.linear1'; expected \[384, 64\] or \[192, 64\]",
    ),
    "a part of a matrix without parts": (
        lambda: plain("double_blocks.0.img_attn.proj.1"),
        r"not part 1 of 'double_blocks.0.img_attn.proj', a matrix without parts",
    ),
    "an unknown module": (
        lambda: plain("transformer.transformer_blocks.0.attn.to_qq"),
        f"has no such linear layer; .* the nearest known name is '{Q}'",
    ),
    "another model's part": (
        lambda: plain(f"controlnet.{Q}"),
        r"cannot apply 'controlnet\..*' and 0 more|cannot apply 'controlnet\..*no such linear layer",
    ),
    "alpha that is no number": (
        lambda: fused(BFL_QKV, {f"{BFL_QKV}.alpha": torch.tensor(True)}),
        "alpha '.*alpha' is stored as BOOL, which is not a number",
    ),
    "DoRA": (lambda: spoil("diffusers", **{f"transformer.{Q}.dora_scale": noise(DIM)}), "a DoRA rescales"),
    "bias differences": (
        lambda: spoil("full difference", **{f"{Q}.diff_b": noise(DIM)}),
        "the linear layers of FLUX.2 have no bias",
    ),
    "OFT": (lambda: Case({f"{Q}.oft_blocks": noise(4, 4)}, {}), "'.*oft_blocks': not a LoRA, LoHa or LoKr factor"),
    "LoRA and full difference of one module": (
        lambda: spoil("diffusers", **{f"transformer.{Q}.diff": noise(DIM, DIM)}),
        "has factors of a LoRA and of a full difference",
    ),
    "LoRA of CLIP": (
        lambda: plain("lora_te1_text_model_encoder_layers_0_self_attn_q_proj"),
        "the adapter changes the text encoder, and that of this variant has no such linear layer",
    ),
    "a pattern without bound": (
        lambda: with_config(plain(Q), 1.0, lora_alpha=4, alpha_pattern={"(a+)+b": 1}),
        r"repeats too much to be matched in bounded time",
    ),
}


@pytest.mark.parametrize("style", REFUSED)
def test_what_has_no_exact_meaning_is_refused(checkpoint: Path, tmp_path: Path, style: str) -> None:
    make, message = REFUSED[style]
    file = make().write(tmp_path / "lora")
    with pytest.raises(UsageError, match=message) as refusal:
        merged(checkpoint, tmp_path, Lora(file))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("style", "message"),
    [
        ("header: lora_alpha, r", "alpha 12 is taken from the header's lora_alpha"),
        ("header: ss_network_alpha", "the header's ss_network_alpha is not applied"),
        ("adapter_config.json without lora_alpha", "has no lora_alpha: the adapter is applied at scale 1"),
    ],
)
def test_the_convention_that_is_followed_is_said(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, style: str, message: str
) -> None:
    with caplog.at_level(logging.WARNING):
        merged(checkpoint, tmp_path, Lora(ACCEPTED[style]().write(tmp_path / "lora")))
    assert message in caplog.text


def test_an_alpha_tensor_outweighs_the_config_beside_it_and_this_is_said(
    checkpoint: Path, base: State, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case = with_config(ACCEPTED["alpha as a number of any type"](), 1.0, lora_alpha=32)
    found = merged(checkpoint, tmp_path, Lora(case.write(tmp_path / "lora")))
    assert_added(found, base, case.truth)
    assert "alpha is 8 in the file's tensor and 32 in" in caplog.text


def test_names_stay_apart_when_dots_become_underscores() -> None:
    for variant in VARIANTS.values():
        linears = all_linears(variant.transformer)
        assert len({name.replace(".", "_") for name in linears}) == len(linears)
        for name, targets in list(linears.items())[:: 1 + len(linears) // 50]:
            for written in (name, name.replace(".", "_"), f"base_model.model.{name}"):
                spot = find_spot(written, variant)
                assert spot is not None
                assert (spot.targets, spot.piece) == (targets, None)


class TestTextEncoder:
    """Adapters of the text encoder are sums like the others, where it has the layer."""

    NAMES = ("text_encoder.model.layers.0.self_attn.q_proj", "lora_te_model_layers_0_self_attn_q_proj")

    @pytest.mark.parametrize("name", NAMES)
    def test_a_lora_is_merged_into_it(self, checkpoint: Path, tmp_path: Path, name: str) -> None:
        variant = read_variant(checkpoint)
        stored = safetensors_file.read_folder(checkpoint / "text_encoder")
        weight = "layers.0.self_attn.q_proj.weight"
        shape = stored[f"model.{weight}"].shape
        a, b = pair(shape[0], columns=shape[1])
        file = Case({f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, {}).write(tmp_path)
        from export.torch_part import bind

        binding = bind("text_encoder", variant, checkpoint, loras=(Lora(file),))
        assert set(binding.derived) == {weight}
        found = torch.from_numpy(read_all(binding.settle(tmp_path).tensors[weight]))
        expected = torch.from_numpy(read_all(stored[f"model.{weight}"])) + b @ a
        assert (found - expected).abs().max() <= 1e-5
        assert not bind("transformer", variant, checkpoint, loras=(Lora(file),)).derived

    def test_it_must_be_exported(self, checkpoint: Path, tmp_path: Path) -> None:
        file = plain(self.NAMES[0], rows=64).write(tmp_path)
        with pytest.raises(UsageError, match="--lora changes the text_encoder, which --parts leaves out"):
            check_parts([Lora(file)], read_variant(checkpoint), ["transformer"])


@pytest.mark.skipif(not FIELD.is_dir(), reason="the field inputs are not here")
@pytest.mark.parametrize("name", sorted(str(p.relative_to(FIELD)) for p in FIELD.rglob("*.safetensors")))
def test_the_field_inputs_are_merged_as_their_truth_says(
    checkpoint: Path, base: State, tmp_path: Path, name: str
) -> None:
    file = FIELD / name
    if "pissa" in name:
        with pytest.raises(UsageError, match="init_lora_weights is 'pissa'"):
            merged(checkpoint, tmp_path, Lora(file))
        return
    truth = {n.removesuffix(".weight"): t for n, t in load_file(file.with_suffix(".truth")).items()}
    assert_added(merged(checkpoint, tmp_path, Lora(file)), base, truth)


def test_a_config_beside_several_files_is_read_for_each_of_them(checkpoint: Path, base: State, tmp_path: Path) -> None:
    case = with_config(plain(Q), 4.0, lora_alpha=16)
    for name in ("adapter_model.safetensors", "copy of it.safetensors"):
        file = case.write(tmp_path / "lora", name)
        assert_added(merged(checkpoint, tmp_path, Lora(file)), base, case.truth)


def test_a_file_that_is_no_safetensors_is_named(checkpoint: Path, tmp_path: Path) -> None:
    save_file({"x": noise(2)}, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="cannot apply 'x': not a LoRA"):
        merged(checkpoint, tmp_path, Lora(tmp_path / "a.safetensors"))
