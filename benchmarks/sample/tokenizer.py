"""Build the sample's tokenizer: each word of the grammar is one token, and capitals are spelled letter by letter."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from kit.sample.world import ARRANGEMENTS, BACKGROUNDS, COLOURS, PLACES, RELATIONS, SHAPES, SIZES, UNSEEN_SHAPES

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")  # the last two: tokens, not hidden
# Renders the same text as the real Qwen3 template for one user turn, with and without thinking.
TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)


def lower_case_words() -> tuple[str, ...]:
    """List the words of the grammar in order of first use, followed by those of the chat template."""
    phrases = [*SHAPES, *UNSEEN_SHAPES, *SIZES, *COLOURS, *BACKGROUNDS, *PLACES, *RELATIONS, *ARRANGEMENTS]
    phrases += ["a", "an", "and", "on", "background", "with the word", "user", "assistant"]
    return tuple(dict.fromkeys(" ".join(phrases).split()))


def build_tokenizer(text_tokens: int) -> Qwen2TokenizerFast:
    """Learn byte pairs from the grammar's words until each is one token, with or without a leading space."""
    lines = [text for word in lower_case_words() for text in (word, f" {word}", f" {word}")] + ["\n\n"]
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=list(SPECIALS),
        show_progress=False,
    )
    byte_pairs.train_from_iterator(lines, trainer)
    tokenizer = Qwen2TokenizerFast(
        vocab=byte_pairs.get_vocab(),
        merges=[tuple(pair) for pair in json.loads(byte_pairs.to_str())["model"]["merges"]],
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        padding_side="right",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.add_tokens([AddedToken(mark, normalized=False, special=False) for mark in SPECIALS[3:]])
    tokenizer.chat_template = TEMPLATE
    tokenizer.model_max_length = text_tokens
    return tokenizer
