"""Load a tokenizer, and check that its folder holds what a server needs before anything is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kit.errors import Flux2Error
from kit.json_object import read_object


def check_tokenizer(folder: Path, error: type[Flux2Error]) -> None:
    """Raise an error, naming the file, for a tokenizer that is missing, in an older format, or has no chat template."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        older = [name for name in ("vocab.json", "tokenizer.model", "tekken.json") if (folder / name).is_file()]
        cure = (
            f"{older[0]} is in an older format, so save it again with transformers' AutoTokenizer.save_pretrained"
            if older
            else "prompts cannot be encoded without it"
        )
        raise error(f"{path}: missing; {cure}")
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON ({problem})") from None
    if not isinstance(loaded, dict) or not isinstance(loaded.get("model"), dict):
        raise error(f"{path}: is not a tokenizer ('model' is missing)")
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return
    config = folder / "tokenizer_config.json"
    if not config.is_file() or not read_object(config).get("chat_template"):
        raise error(f"{folder}: has no chat template (chat_template.jinja); FLUX.2 writes prompts with it")


def load_tokenizer(folder: Path, error: type[Flux2Error]) -> Any:
    """Check and load a tokenizer with transformers' generic class; raises an error for one that it cannot load.

    The generic class is chosen because AutoTokenizer imports torch, which adds two seconds to a server's start.
    """
    from transformers import PreTrainedTokenizerFast

    check_tokenizer(folder, error)
    try:
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as problem:  # of the tokenizers package, which raises nothing more specific
        reason = str(problem).strip().partition("\n")[0]
        raise error(f"{folder}: the tokenizer cannot be loaded ({type(problem).__name__}: {reason})") from problem
