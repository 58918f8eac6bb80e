"""Train the text encoder on the grammar: the nine template tokens after a prompt learn to encode its meaning.

A large language model understands "left of" before any image model is trained on it, and so does this one. At the
tokens from `<|im_end|>` to the line end after `</think>`, which attend to the whole prompt, small linear heads read
three things, the background and five letters from the tapped hidden states. The heads are discarded; the transformer
uses the hidden states.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import Flux2KleinPipeline
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from kit.sample.draw import first_column
from kit.sample.world import BACKGROUNDS, COLOURS, LAYOUTS, SHAPES, SIZES, UNSEEN_SHAPES, Scene, random_scene

from .models import TAPS
from .recipe import TrainingRecipe
from .trainer import Report, Run, train

THINGS, LETTERS = 3, 5
SLOTS = THINGS + 1 + LETTERS  # template tokens after the prompt, one fact each

_SHAPES = ("", *SHAPES, *UNSEEN_SHAPES)
_COLOURS = ("", *COLOURS)
_SIZES = ("absent", *SIZES)
_XS = (0, *sorted({x for layouts in LAYOUTS for centres in layouts.values() for x, _ in centres}))
_YS = (0, *sorted({y for layouts in LAYOUTS for centres in layouts.values() for _, y in centres}))
_ALPHABET = " ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COLUMNS = 8
THING_CLASSES = (len(_SHAPES), len(_COLOURS), len(_SIZES), len(_XS), len(_YS))
LETTER_CLASSES = (len(_ALPHABET), _COLUMNS)


def facts(scene: Scene) -> list[list[int]]:
    """Return the class indices of each slot's facts: things, background, letters."""
    said = []
    for thing, (x, y) in zip(scene.things, scene.centres(), strict=True):
        numbers = [_SHAPES.index(thing.shape), _COLOURS.index(thing.colour), _SIZES.index(thing.size)]
        said.append([*numbers, _XS.index(x), _YS.index(y)])
    said += [[0] * len(THING_CLASSES)] * (THINGS - len(said))
    said.append([sorted(BACKGROUNDS).index(scene.background)])
    for index, letter in enumerate(scene.word.ljust(LETTERS)):
        said.append([_ALPHABET.index(letter), first_column(scene.word) + index if letter != " " else 0])
    return said


def encode(encoder: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> Tensor:
    """Return prompt features [B, T, 3H] with the pipeline's own code, including padding."""
    embeds: Tensor = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        encoder, tokenizer, prompts, max_sequence_length=tokenizer.model_max_length
    )
    return embeds


class Heads(nn.Module):
    """Linear heads that read the slots, one per kind of fact."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.slots = nn.ModuleList(
            nn.ModuleList(nn.Linear(width, classes) for classes in kinds)
            for kinds in [THING_CLASSES] * THINGS + [(len(BACKGROUNDS),)] + [LETTER_CLASSES] * LETTERS
        )

    def forward(self, features: Tensor, starts: list[int], wanted: list[list[list[int]]]) -> Tensor:
        """Return the mean cross-entropy of all facts, given where each row's slots start."""
        losses = []
        rows = torch.arange(len(starts))
        for index, readers in enumerate(self.slots):
            assert isinstance(readers, nn.ModuleList)
            state = features[rows, torch.tensor(starts) + index]  # [B, 3H]
            for kind, reader in enumerate(readers):
                target = torch.tensor([row[index][kind] for row in wanted], device=features.device)
                losses.append(functional.cross_entropy(reader(state), target))
        return torch.stack(losses).mean()


def slot_starts(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> list[int]:
    """Return the index of the token that ends each prompt; two special tokens and a line end precede it."""
    return [3 + len(ids) for ids in tokenizer(prompts)["input_ids"]]


class Reader(nn.Module):
    """The text encoder and its heads, trained together."""

    def __init__(self, encoder: Qwen3ForCausalLM, width: int) -> None:
        super().__init__()
        self.encoder, self.heads = encoder, Heads(len(TAPS) * width)


def train_text(
    encoder: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    recipe: TrainingRecipe,
    folder: Path,
    report: Report | None = None,
) -> list[Run]:
    """Train encoder and heads together on random sentences of the grammar."""
    torch.manual_seed(recipe.seed + 3)
    reader = Reader(encoder, recipe.text_width).to(next(encoder.parameters()).device)

    def loss_at(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(recipe.seed * 7919 + step)
        scenes = [random_scene(rng, SHAPES + UNSEEN_SHAPES) for _ in range(recipe.text.batch)]
        prompts = [scene.prompt() for scene in scenes]
        features = encode(encoder, tokenizer, prompts)
        loss: Tensor = reader.heads(features, slot_starts(tokenizer, prompts), [facts(scene) for scene in scenes])
        return loss

    # the last layer is above the last tap, so it is unused and keeps its random initialization
    encoder.model.layers[TAPS[-1] :].requires_grad_(False)
    encoder.model.norm.requires_grad_(False)
    run = train("text", recipe.text, reader, loss_at, folder, recipe.seed, report)
    encoder.eval().requires_grad_(False)
    return [run]
