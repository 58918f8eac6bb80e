"""Adapters of every file style, merged at export, match torch with the delta added by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from export.lora.merge import merge
from export.lora.terms import Lora
from export.values import read_all
from export.weights import Binding, find
from kit import safetensors_file, tiny
from kit.configs import read_variant
from tests.export.bfl import State, to_bfl, to_diffusers

TOLERANCE = 1e-5
RANK = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkpoint of the family that has every linear layer, including guidance."""
    return tiny.save(tmp_path_factory.mktemp("lora") / "checkpoint", tiny.Tiny("dev", text_tokens=64))


@pytest.fixture(scope="module")
def state(checkpoint: Path) -> State:
    loaded: State = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    return loaded


def bind(checkpoint: Path, *loras: Lora) -> Binding:
    variant = read_variant(checkpoint)
    shapes = {name: tensor.shape for name, tensor in safetensors_file.read_folder(checkpoint / "transformer").items()}
    return merge(find("transformer", variant, checkpoint, shapes), loras, variant.transformer)


def merged(checkpoint: Path, folder: Path, *loras: Lora) -> State:
    """Merge adapters and read every weight of the transformer from where the graph would read it."""
    out = folder / "settled"
    out.mkdir(exist_ok=True)
    settled = bind(checkpoint, *loras).settle(out)
    return {name: torch.from_numpy(read_all(tensor)) for name, tensor in settled.tensors.items()}


def assert_equal(found: State, expected: State) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs()
        assert difference.max() <= TOLERANCE, f"{name}: max {difference.max():.2e}, mean {difference.mean():.2e}"


def linears(state: State) -> State:
    return {name.removesuffix(".weight"): tensor for name, tensor in state.items() if tensor.ndim == 2}


def factors(weight: Tensor, seed: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.shape
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


@dataclass(frozen=True)
class Made:
    """A file's tensors and header, and the delta of each matrix in the names that the file uses."""

    tensors: State
    deltas: State
    metadata: dict[str, str] | None = None


Style = Callable[[State], Made]


def low_rank(
    name: Callable[[str], str],
    down: str = "lora_A",
    up: str = "lora_B",
    alpha: float | None = None,
    metadata: dict[str, str] | None = None,
    scale_of: Callable[[str], float] | None = None,
) -> Style:
    """Describe a style of A and B factors; `scale_of` returns a module's scale if it is not alpha / rank."""

    def make(matrices: State) -> Made:
        made: State = {}
        deltas: State = {}
        for seed, (module, weight) in enumerate(matrices.items()):
            a, b = factors(weight, seed)
            made[f"{name(module)}.{down}.weight"] = a
            made[f"{name(module)}.{up}.weight"] = b
            if alpha is not None:
                made[f"{name(module)}.alpha"] = torch.tensor(alpha)
            scale = scale_of(module) if scale_of else 1.0 if alpha is None else alpha / RANK
            deltas[module] = scale * b @ a
        return Made(made, deltas, metadata)

    return make


def lokr(name: Callable[[str], str], left: bool, right: bool, alpha: float | None = None, height: int = 4) -> Style:
    """Describe a style of Kronecker factors; `left` and `right` say which of them is itself a product."""

    def side(made: State, key: str, rows: int, columns: int, seed: int, factored: bool) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if not factored:
            made[key] = torch.randn(rows, columns, generator=generator)
            return made[key]
        made[f"{key}_a"] = torch.randn(rows, 2, generator=generator)
        made[f"{key}_b"] = torch.randn(2, columns, generator=generator)
        return made[f"{key}_a"] @ made[f"{key}_b"]

    def make(matrices: State) -> Made:
        made: State = {}
        deltas: State = {}
        for seed, (module, weight) in enumerate(matrices.items()):
            rows, columns = weight.shape
            first = side(made, f"{name(module)}.lokr_w1", height, 8, seed, left)
            second = side(made, f"{name(module)}.lokr_w2", rows // height, columns // 8, 1000 + seed, right)
            scale = 1.0
            if alpha is not None:
                made[f"{name(module)}.alpha"] = torch.tensor(alpha)
                scale = alpha / 2 if left or right else 1.0
            deltas[module] = scale * torch.kron(first, second)
        return Made(made, deltas)

    return make


def prefixed(prefix: str) -> Callable[[str], str]:
    return lambda module: prefix + module


def underscored(prefix: str) -> Callable[[str], str]:
    return lambda module: prefix + module.replace(".", "_")


def aliased(module: str) -> str:
    return (
        "diffusion_model." + ("sformer" + module.removeprefix("transformer"))
        if module.startswith("transformer_blocks.")
        else "diffusion_model." + module
    )


HEADER = {
    "lora_adapter_metadata": json.dumps(
        {
            "transformer.r": RANK,
            "transformer.target_modules": ["to_q", "to_k", "to_v"],
            "transformer.lora_alpha": 2 * RANK,
            "transformer.rank_pattern": {},
            "transformer.alpha_pattern": {"transformer_blocks.1.attn.to_q": 3, r"attn\.to_k": 5},
        }
    )
}


def header_scale(module: str) -> float:
    if module == "transformer_blocks.1.attn.to_q":
        return 3 / RANK
    return 5 / RANK if module.endswith("attn.to_k") else 2.0


OF_DIFFUSERS: dict[str, Style] = {
    "diffusers": low_rank(prefixed("transformer.")),
    "diffusers with alpha in the header": low_rank(prefixed("transformer."), metadata=HEADER, scale_of=header_scale),
    "expanded blocks": low_rank(prefixed("diffusion_model.")),
    "expanded blocks by their alias": low_rank(aliased, alpha=6.0),
    "peft": low_rank(prefixed("base_model.model.")),
    "peft of a pipeline": low_rank(prefixed("base_model.model.transformer.")),
    "transformer.* down and up": low_rank(prefixed("transformer."), "lora_down", "lora_up"),
    "transformer.* down and up with alpha": low_rank(prefixed("transformer."), "lora_down", "lora_up", alpha=2.0),
    "bare": low_rank(prefixed("")),
    "older diffusers": low_rank(prefixed("transformer."), "lora.down", "lora.up"),
    "kohya on diffusers names": low_rank(underscored("lora_unet_"), "lora_down", "lora_up", alpha=1.0),
    "unsaved peft": low_rank(prefixed("base_model.model."), "lora_A.default", "lora_B.default"),
    "lycoris": lokr(underscored("lycoris_"), False, True, alpha=3.0),
    "LoKr on diffusers names": lokr(prefixed("transformer."), True, True, alpha=3.0),
}
OF_BFL: dict[str, Style] = {
    "ai-toolkit": low_rank(prefixed("diffusion_model.")),
    "ai-toolkit with alpha": low_rank(prefixed("diffusion_model."), alpha=2.0),
    "peft": low_rank(prefixed("base_model.model.")),
    "kohya": low_rank(underscored("lora_unet_"), "lora_down", "lora_up", alpha=1.0),
    "ComfyUI": low_rank(prefixed("diffusion_model."), "lora_down", "lora_up", alpha=16.0),
    "ComfyUI with its outer prefix": low_rank(prefixed("model.diffusion_model."), "lora_down", "lora_up"),
    "bare": low_rank(prefixed("")),
    "LoKr": lokr(prefixed("diffusion_model."), False, False, alpha=1e10),
    "LoKr with a factored right side": lokr(prefixed("diffusion_model."), False, True, alpha=1.0),
    "LoKr with a factored left side": lokr(prefixed(""), True, False),
    "kohya LoKr": lokr(underscored("lora_unet_"), True, True, alpha=1.0),
}


def write(folder: Path, made: Made, name: str = "adapter.safetensors") -> Path:
    file = folder / name
    save_file({key: tensor.contiguous() for key, tensor in made.tensors.items()}, file, metadata=made.metadata)
    return file


@pytest.mark.parametrize("style", OF_DIFFUSERS)
def test_every_linear_is_merged_from_a_file_with_names_of_diffusers(
    checkpoint: Path, state: State, tmp_path: Path, style: str
) -> None:
    made = OF_DIFFUSERS[style](linears(state))
    expected = {n: w + made.deltas[n.removesuffix(".weight")] if w.ndim == 2 else w for n, w in state.items()}
    assert_equal(merged(checkpoint, tmp_path, Lora(write(tmp_path, made))), expected)


@pytest.mark.parametrize("style", OF_BFL)
def test_every_linear_is_merged_from_a_file_with_names_of_black_forest_labs(
    checkpoint: Path, state: State, tmp_path: Path, style: str
) -> None:
    """The delta is added under the names of the file; diffusers' converter renames the sum."""
    bfl = to_bfl(state)
    made = OF_BFL[style](linears(bfl))
    expected = to_diffusers(
        {n: w + made.deltas[n.removesuffix(".weight")] if w.ndim == 2 else w for n, w in bfl.items()}
    )
    assert_equal(merged(checkpoint, tmp_path, Lora(write(tmp_path, made), 0.5)), halfway(state, expected))


def halfway(state: State, expected: State) -> State:
    return {name: (state[name] + tensor) / 2 for name, tensor in expected.items()}


def test_diffusers_names_of_fused_projections_are_thirds(checkpoint: Path, state: State, tmp_path: Path) -> None:
    attn = "transformer_blocks.0.attn"
    fused = torch.cat([state[f"{attn}.{name}.weight"] for name in ("add_q_proj", "add_k_proj", "add_v_proj")])
    made = low_rank(prefixed("transformer."))({f"{attn}.to_added_qkv": fused})
    found = merged(checkpoint, tmp_path, Lora(write(tmp_path, made)))
    expected = (fused + made.deltas[f"{attn}.to_added_qkv"]).chunk(3)
    for name, third in zip(("add_q_proj", "add_k_proj", "add_v_proj"), expected, strict=True):
        assert torch.allclose(found[f"{attn}.{name}.weight"], third, atol=TOLERANCE)


def test_peft_keeps_alpha_in_a_config_beside_its_file(checkpoint: Path, state: State, tmp_path: Path) -> None:
    module = "transformer_blocks.0.attn.to_q"
    weight = state[f"{module}.weight"]
    made = low_rank(prefixed("base_model.model."))({module: weight})
    file = write(tmp_path, made, "adapter_model.safetensors")
    config: dict[str, Any] = {"peft_type": "LORA", "r": RANK, "lora_alpha": 12}
    for extra, scale in (({}, 3.0), ({"use_rslora": True}, 12 / sqrt(RANK)), ({"alpha_pattern": {"to_q": 2}}, 0.5)):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | extra))
        found = merged(checkpoint, tmp_path, Lora(file))[f"{module}.weight"]
        assert torch.allclose(found, weight + scale * made.deltas[module], atol=TOLERANCE)


def stack(state: State, folder: Path) -> tuple[list[Lora], State]:
    """Three adapters of mixed ranks, styles and weights on overlapping modules, and their expected sum."""
    q, qkv = "transformer_blocks.0.attn.to_q", "double_blocks.0.img_attn.qkv"
    bfl = to_bfl(state)
    first, second = factors(state[f"{q}.weight"], 1, rank=2), factors(bfl[f"{qkv}.weight"], 2, rank=16)
    third = factors(bfl["final_layer.adaLN_modulation.1.weight"], 3, rank=5)
    files = [
        {f"transformer.{q}.lora_A.weight": first[0], f"transformer.{q}.lora_B.weight": first[1]},
        {
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": second[0],
            "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": second[1],
            "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(4.0),
        },
        {
            "final_layer.adaLN_modulation.1.lora_A.weight": third[0],
            "final_layer.adaLN_modulation.1.lora_B.weight": third[1],
            f"{qkv}.lora_A.weight": second[0].flip(0),
            f"{qkv}.lora_B.weight": second[1],
        },
    ]
    weights = (0.7, -1.25, 2.0)
    loras = []
    for i, (tensors_of, weight) in enumerate(zip(files, weights, strict=True)):
        save_file({k: v.contiguous() for k, v in tensors_of.items()}, folder / f"{i}.safetensors")
        loras.append(Lora(folder / f"{i}.safetensors", weight))
    bfl[f"{qkv}.weight"] = (
        bfl[f"{qkv}.weight"] - 1.25 * 4 / 16 * second[1] @ second[0] + 2.0 * second[1] @ second[0].flip(0)
    )
    last = "final_layer.adaLN_modulation.1.weight"
    bfl[last] = bfl[last] + 2.0 * third[1] @ third[0]
    expected = to_diffusers(bfl)
    expected[f"{q}.weight"] = expected[f"{q}.weight"] + 0.7 * first[1] @ first[0]
    return loras, expected


def test_a_stack_of_three_with_mixed_ranks_adds_up_in_any_order(checkpoint: Path, state: State, tmp_path: Path) -> None:
    loras, expected = stack(state, tmp_path)
    assert_equal(merged(checkpoint, tmp_path, *loras), expected)
    assert_equal(merged(checkpoint, tmp_path, *reversed(loras)), expected)


def test_only_what_changes_is_written_and_the_rest_points_at_the_checkpoint(
    checkpoint: Path, state: State, tmp_path: Path
) -> None:
    loras, _ = stack(state, tmp_path)
    binding = bind(checkpoint, *loras)
    changed = {f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"} | {"norm_out.linear.weight"}
    assert set(binding.derived) == changed
    settled = binding.settle(tmp_path)
    assert {file.name for file in settled.files} == {"derived.safetensors", "diffusion_pytorch_model.safetensors"}
    assert {n for n, t in settled.tensors.items() if t.file.name == "derived.safetensors"} == changed
    stored = load_file(tmp_path / "derived.safetensors")  # the reference implementation reads the file
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == {
        name: tuple(state[name].shape) for name in changed
    }


def test_weight_zero_gives_the_checkpoint_to_the_bit(checkpoint: Path, state: State, tmp_path: Path) -> None:
    loras, _ = stack(state, tmp_path)
    found = merged(checkpoint, tmp_path, *(Lora(lora.file, 0.0) for lora in loras))
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_bf16_weight_stays_bf16_and_is_rounded_once(state: State, tmp_path: Path) -> None:
    checkpoint = tiny.save(tmp_path / "checkpoint", tiny.Tiny("dev", text_tokens=64), dtype="bf16")
    loras, _ = stack(state, tmp_path)
    base = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    _, exact = stack({name: tensor.float() for name, tensor in base.items()}, tmp_path)
    binding = bind(checkpoint, *loras)
    assert {tensor.dtype for tensor in binding.derived.values()} == {"BF16"}
    settled = binding.settle(tmp_path)
    for name in binding.derived:
        found = torch.from_numpy(read_all(settled.tensors[name]))
        step = np.spacing(exact[name].abs().numpy().astype(np.float32)) * 2**16  # of bf16
        assert (np.abs(found.numpy() - exact[name].numpy()) <= 0.5 * step + TOLERANCE).all()


def test_a_large_weight_is_computed_in_pieces(
    checkpoint: Path, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("export.derived.CHUNK_VALUES", 500)
    loras, expected = stack(state, tmp_path)
    assert_equal(merged(checkpoint, tmp_path, *loras), expected)
    lokr_file = write(tmp_path, OF_BFL["kohya LoKr"](linears(to_bfl(state))), "lokr.safetensors")
    whole = merged(checkpoint, tmp_path, Lora(lokr_file))
    monkeypatch.undo()
    assert_equal(whole, merged(checkpoint, tmp_path, Lora(lokr_file)))
