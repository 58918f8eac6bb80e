"""Tokenize prompts with the chat template and the padding of the checkpoint's own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from kit.errors import ArtifactError, RequestError
from kit.tokenizer_files import load_tokenizer

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Tokens:
    """Token ids and mask of one text, both [text_tokens]; padding is kept because the transformer attends to it."""

    input_ids: Int64
    attention_mask: Int64


class PromptEncoder:
    """Renders a prompt as diffusers does and tokenizes it to the variant's fixed text length.

    klein: one user turn with thinking disabled, padded on the right. dev: a system message and one user turn, padded
    on the left. Unlike diffusers, which truncates silently, it rejects a text that is too long.
    """

    def __init__(
        self,
        folder: Path,
        kind: Literal["qwen3", "mistral3"],
        text_tokens: int,
        system_message: str | None = None,  # of dev; None: read from the folder
    ) -> None:
        self.kind = kind
        self.text_tokens = text_tokens
        self.tokenizer: Any = load_tokenizer(folder, ArtifactError)
        self.system_message = system_message or ""
        if kind == "mistral3" and system_message is None:
            path = folder / "system_message.txt"
            if not path.is_file():
                raise ArtifactError(f"{path}: missing; the dev text encoder needs it, export the checkpoint again")
            self.system_message = path.read_text()

    def encode(self, text: str, field: str = "prompt") -> Tokens:
        """Tokenize one text; raises RequestError, which names the field, if the text is too long."""
        rendered = self._render(text)
        added = self.kind == "qwen3"  # the mistral template adds <s> itself; its tokenizer would add another
        length = len(self.tokenizer(rendered, add_special_tokens=added)["input_ids"])
        if length > self.text_tokens:
            raise RequestError(
                f"{field}: {length} tokens with the chat template; the limit is {self.text_tokens}, shorten the text "
                f"by {length - self.text_tokens} tokens"
            )
        encoded = self.tokenizer(
            rendered,
            add_special_tokens=added,
            padding="max_length",
            max_length=self.text_tokens,
            truncation=True,
            return_tensors="np",
        )
        return Tokens(
            encoded["input_ids"][0].astype(np.int64),
            encoded["attention_mask"][0].astype(np.int64),
        )

    def _render(self, text: str) -> str:
        if self.kind == "qwen3":
            messages: list[dict[str, Any]] = [{"role": "user", "content": text}]
            options: dict[str, Any] = {"add_generation_prompt": True, "enable_thinking": False}
        else:
            # like diffusers, strip the image token: the processor would count it as an image
            text = text.replace("[IMG]", "")
            messages = [
                {"role": role, "content": [{"type": "text", "text": content}]}
                for role, content in (("system", self.system_message), ("user", text))
            ]
            options = {"add_generation_prompt": False}
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options))
