"""Define all sizes and hyperparameters of the sample checkpoint and its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Stages = Literal["last", "edit"]  # the decoder's and the transformer's last stages; the transformer's last stage


@dataclass(frozen=True)
class Stage:
    """One training stage: number of steps, batch size and learning rate."""

    steps: int
    batch: int
    rate: float
    warmup: int = 100
    average: float = 0.99  # decay of the moving average of the weights; the average is shipped
    horizon: int = 0  # step at which the learning rate reaches zero, if not the last step


@dataclass(frozen=True)
class TrainingRecipe:
    """The sample checkpoint: models, data and stages. Small versions are made with ``dataclasses.replace``."""

    seed: int = 3
    text_tokens: int = 48  # tokenizer.model_max_length: the template takes 12, the longest sentence 31
    # text encoder (Qwen3): the taps are 9, 18 and 27, so 28 layers
    text_width: int = 64
    text_hidden: int = 96
    text_layers: int = 28
    text_heads: int = 4
    # image encoder and decoder
    vae_channels: tuple[int, ...] = (16, 32, 64, 64)
    vae_groups: int = 8
    # transformer
    heads: int = 6
    head_width: int = 32
    double_blocks: int = 2
    single_blocks: int = 4
    # data
    images: int = 8000  # crowded crops for the image encoder and decoder; an eighth as many whole images
    crop: int = 64  # side of a crop; whole images, half of them crowded, come last
    latent_noise: float = 0.1  # of a channel's deviation, to make the decoder tolerate errors
    scenes: int = 10000  # for the transformer, drawn with jitter
    settled_scenes: int = 7000  # the first of them drawn again without jitter, for the last stages
    # stages, in order
    text: Stage = field(default=Stage(360, 48, 2e-3, horizon=600))
    vae: Stage = field(default=Stage(600, 24, 3e-3, average=0.995, horizon=1600))
    vae_whole: Stage = field(default=Stage(160, 8, 2e-3, warmup=20, horizon=400))
    vae_polish: Stage = field(default=Stage(240, 8, 1.5e-3, warmup=20))
    polish_noise: float = 0.2  # as latent_noise, for the decoder alone: as large as the denoiser's errors
    vae_sharp: Stage = field(default=Stage(700, 8, 2e-3, warmup=20))  # the decoder alone, on hard images
    vae_faint: Stage = field(default=Stage(900, 8, 1.5e-3, warmup=20))  # the same with low contrast
    hard_images: int = 3000
    denoiser: Stage = field(default=Stage(533, 32, 2e-3, average=0.995, horizon=1200))
    denoiser_long: Stage = field(default=Stage(452, 48, 3e-3, warmup=30, average=0.995, horizon=1250))
    denoiser_settle: Stage = field(default=Stage(680, 32, 2.5e-3, warmup=30))
    denoiser_finish: Stage = field(default=Stage(300, 32, 1.6e-3, warmup=15))
    denoiser_last: Stage = field(default=Stage(360, 32, 2e-3, warmup=15))
    denoiser_hard: Stage = field(default=Stage(240, 32, 2e-3, warmup=15))
    hard_share: float = 0.4  # share of this stage's examples with a small cross, which is learned last
    own_levels: tuple[float, ...] = (0.5, 0.8, 0.8, 0.9, 0.9, 0.9)  # share of the pipeline's own levels, by stage
    edits: int = 1  # edits of each settled scene, for the last stage
    edit: Stage = field(default=Stage(592, 20, 2.5e-3, warmup=30, horizon=1000))
    edit_long: Stage = field(default=Stage(1600, 20, 2.5e-3, warmup=15))
    changed_weight: tuple[float, ...] = (2.0, 8.0)  # of the tokens that an edit changes, by stage
    edit_share: float = 0.7  # of a batch: edits of a reference image; the rest are images from text alone
    lora: Stage = field(default=Stage(400, 32, 8e-3, warmup=10))
    lora_rank: int = 8
    lora_scenes: int = 700
