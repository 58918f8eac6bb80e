"""Adapter files of many styles for one tiny transformer, each with the difference it must add, computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

State = dict[str, Tensor]
DIM, RANK, REST = 64, 4, 384
Q, K, V = (f"transformer_blocks.0.attn.to_{x}" for x in "qkv")
QKV = (Q, K, V)
SINGLE = "single_transformer_blocks.0.attn.to_qkv_mlp_proj"
FF = "transformer_blocks.0.ff.linear_in"
BFL_QKV = "double_blocks.0.img_attn.qkv"


@dataclass(frozen=True)
class Case:
    """Tensors and header of a file, the files beside it, and the difference of each weight by diffusers' name."""

    tensors: State
    truth: State
    metadata: dict[str, str] | None = None
    beside: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path, name: str = "adapter.safetensors") -> Path:
        """Write the file and the files next to it; returns the file."""
        folder.mkdir(parents=True, exist_ok=True)
        for other, text in self.beside.items():
            (folder / other).write_text(text)
        save_file({k: t.contiguous() for k, t in self.tensors.items()}, folder / name, metadata=self.metadata)
        return folder / name


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def pair(rows: int, rank: int = RANK, columns: int = DIM, seed: int = 0) -> tuple[Tensor, Tensor]:
    return noise(rank, columns, seed=seed), noise(rows, rank, seed=seed + 1)


def thirds(delta: Tensor) -> State:
    return dict(zip(QKV, delta.chunk(3), strict=True))


def plain(
    name: str, truth: str = Q, rows: int = DIM, scale: float = 1.0, down: str = "lora_A", up: str = "lora_B"
) -> Case:
    """One module with A and B under a name; `truth` is the weight it changes."""
    a, b = pair(rows)
    return Case({f"{name}.{down}.weight": a, f"{name}.{up}.weight": b}, {truth: scale * b @ a})


def fused(name: str, extra: State | None = None, scale: float = 1.0) -> Case:
    """The three projections of a double block in one module."""
    a, b = pair(3 * DIM)
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b, **(extra or {})}
    return Case(tensors, thirds(scale * b @ a))


def numbered(qkv: str, linear1: str, separator: str = ".") -> Case:
    """Fused matrices in numbered parts, each with factors and an alpha of its own."""
    tensors: State = {}
    truth: State = {}
    delta = torch.zeros(3 * DIM + REST, DIM)
    for i, rows in enumerate((DIM, DIM, DIM)):
        a, b = pair(rows, seed=10 * i)
        tensors |= _kohya(f"{qkv}{separator}{i}", a, b, alpha=2.0 + i)
        truth[QKV[i]] = (2.0 + i) / RANK * b @ a
    for i, (begin, rows) in enumerate(((0, DIM), (DIM, DIM), (2 * DIM, DIM), (3 * DIM, REST))):
        a, b = pair(rows, seed=100 + 10 * i)
        tensors |= _kohya(f"{linear1}{separator}{i}", a, b, alpha=1.0)
        delta[begin : begin + rows] = b @ a / RANK
    return Case(tensors, truth | {SINGLE: delta})


def _kohya(name: str, a: Tensor, b: Tensor, alpha: float) -> State:
    return {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b, f"{name}.alpha": torch.tensor(alpha)}


def peft_of_bfl(alpha: str, rank: str) -> Case:
    """A peft adapter trained on black-forest-labs' names, with settings for one of its modules."""
    a, b = pair(3 * DIM, rank=8)
    c, d = pair(3 * DIM + REST)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "alpha_pattern": {alpha: 24}, "rank_pattern": {rank: 8}}
    name = "base_model.model."
    tensors = {
        f"{name}{BFL_QKV}.lora_A.weight": a,
        f"{name}{BFL_QKV}.lora_B.weight": b,
        f"{name}single_blocks.0.linear1.lora_A.weight": c,
        f"{name}single_blocks.0.linear1.lora_B.weight": d,
    }
    truth = thirds(3.0 * b @ a) | {SINGLE: 0.5 * d @ c}
    return Case(tensors, truth, beside={"adapter_config.json": json.dumps(config)})


def one_target_of_a_fused_module() -> Case:
    """A pattern for one of the three projections that a fused module changes."""
    made = fused(f"diffusion_model.{BFL_QKV}")
    header = {"transformer.r": RANK, "transformer.lora_alpha": RANK, "transformer.alpha_pattern": {r"attn\.to_k": 20}}
    truth = {name: delta * (5.0 if name == K else 1.0) for name, delta in made.truth.items()}
    return Case(made.tensors, truth, {"lora_adapter_metadata": json.dumps(header)})


def with_config(case: Case, scale: float, **settings: object) -> Case:
    config = json.dumps({"peft_type": "LORA", "r": RANK, **settings})
    return Case(case.tensors, {n: scale * t for n, t in case.truth.items()}, beside={"adapter_config.json": config})


def with_words(case: Case, scale: float, **words: str) -> Case:
    return Case(case.tensors, {n: scale * t for n, t in case.truth.items()}, words)


def with_alpha(dtype: torch.dtype, shape: tuple[int, ...] = ()) -> Case:
    return fused(
        f"diffusion_model.{BFL_QKV}", {f"diffusion_model.{BFL_QKV}.alpha": torch.full(shape, 8).to(dtype)}, 2.0
    )


def loha() -> Case:
    (b1, a1), (b2, a2) = pair(DIM, seed=1), pair(DIM, seed=7)
    name = "lycoris_" + Q.replace(".", "_")
    tensors = {
        f"{name}.hada_w1_a": a1,
        f"{name}.hada_w1_b": b1,
        f"{name}.hada_w2_a": a2,
        f"{name}.hada_w2_b": b2,
        f"{name}.alpha": torch.tensor(2.0),
    }
    return Case(tensors, {Q: 2.0 / RANK * (a1 @ b1) * (a2 @ b2)})


def full_difference() -> Case:
    matrix, vector = noise(3 * DIM, DIM), noise(32)
    tensors = {
        f"diffusion_model.{BFL_QKV}.diff": matrix,
        "diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": vector,
    }
    return Case(tensors, thirds(matrix) | {"transformer_blocks.0.attn.norm_q": vector})


def last_layer() -> Case:
    """The modulation of the last layer, whose halves are in the opposite order in diffusers."""
    a, b = pair(2 * DIM)
    name = "lora_unet_final_layer_adaLN_modulation_1"
    shift, scale = (b @ a).chunk(2)
    return Case(
        {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b}, {"norm_out.linear": torch.cat([scale, shift])}
    )


# The styles of docs/accepted.md, by the names there.
ACCEPTED: Mapping[str, Callable[[], Case]] = {
    "diffusers": lambda: plain(f"transformer.{Q}"),
    "diffusers, fused projections": lambda: fused("transformer.transformer_blocks.0.attn.to_qkv"),
    "peft": lambda: plain(f"base_model.model.{Q}"),
    "ai-toolkit": lambda: fused(f"diffusion_model.{BFL_QKV}"),
    "ComfyUI": lambda: fused(f"model.diffusion_model.{BFL_QKV}"),
    "kohya": lambda: plain("lora_unet_" + FF.replace(".", "_"), FF, REST, 1.0, "lora_down", "lora_up"),
    "bare names": lambda: fused(BFL_QKV),
    "wrappers of torch.compile and FSDP": lambda: plain(
        "_fsdp_wrapped_module.transformer._orig_mod.transformer_blocks.0._checkpoint_wrapped_module.attn.to_q"
    ),
    "several wrappers": lambda: plain(f"pipeline.transformer.base_model.model.{Q}"),
    "dots and underscores mixed": lambda: fused("diffusion_model.double_blocks.0.img_attn_qkv"),
    "underscores before dots": lambda: plain("transformer_transformer_blocks_0.attn.to_q"),
    "an adapter's name in the key": lambda: plain(f"transformer.{Q}", Q, DIM, 1.0, "lora_A.style", "lora_B.style"),
    "factors without .weight": lambda: Case(
        {k.removesuffix(".weight"): t for k, t in plain(f"transformer.{Q}").tensors.items()}, plain(Q).truth
    ),
    "factors of older diffusers": lambda: plain(
        f"transformer.{Q}", Q, DIM, 1.0, "lora_linear_layer.down", "lora_linear_layer.up"
    ),
    "numbered parts": lambda: numbered(f"transformer.{BFL_QKV}", "transformer.single_blocks.0.linear1"),
    "numbered parts, underscores": lambda: numbered(
        "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_single_blocks_0_linear1", "_"
    ),
    "numbered parts of diffusers' fused projections": lambda: numbered(
        "transformer.transformer_blocks.0.attn.to_qkv", f"transformer.{SINGLE}"
    ),
    "peft patterns, names of black-forest-labs": lambda: peft_of_bfl(BFL_QKV, BFL_QKV),
    "peft patterns, names of diffusers": lambda: peft_of_bfl(r"to_qkv", r"transformer_blocks\.0\.attn\.to_qkv"),
    "peft patterns with a wrapper": lambda: peft_of_bfl(f"diffusion_model.{BFL_QKV}", f"base_model.model.{BFL_QKV}"),
    "a pattern for one projection of a fused module": one_target_of_a_fused_module,
    "adapter_config.json": lambda: with_config(plain(f"base_model.model.{Q}"), 4.0, lora_alpha=16),
    "adapter_config.json, rslora": lambda: with_config(
        plain(f"base_model.model.{Q}"), 8.0, lora_alpha=16, use_rslora=True
    ),
    "adapter_config.json without lora_alpha": lambda: with_config(plain(f"base_model.model.{Q}"), 1.0, lora_alpha=None),
    "header: lora_alpha, r": lambda: with_words(plain(f"transformer.{Q}"), 3.0, lora_alpha="12", r="4"),
    "header: network_alpha": lambda: with_words(plain(f"transformer.{Q}"), 0.5, network_alpha="2.0"),
    "header: peft's settings under another key": lambda: with_words(
        plain(f"transformer.{Q}"), 2.0, lora_config=json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": 8})
    ),
    "header: ss_network_alpha": lambda: with_words(plain(f"transformer.{Q}"), 1.0, ss_network_alpha="2.0"),
    "alpha as a number of any type": lambda: with_alpha(torch.int64),
    "alpha of shape [1]": lambda: with_alpha(torch.uint8, (1,)),
    "LoHa": loha,
    "full difference": full_difference,
    "the last layer's modulation": last_layer,
}
