"""Measure LPIPS and CLIP scores if their packages and weights are installed; nothing is ever downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from kit.errors import UsageError
from quantize.gate.drawing import Drawing, Measure
from quantize.gate.metrics import Score
from quantize.gate.similarity import Pixels
from quantize.prompt_set import Prompt

ALEXNET = "alexnet-owt-7be5be79.pth"  # torchvision's weights of the network that LPIPS uses


def lpips_measure() -> Measure | str:
    """Return the measure LPIPS 0.1 with AlexNet, or what is missing."""
    if importlib.util.find_spec("lpips") is None:
        return "the package lpips is not installed"
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if not weights.is_file():
        return f"AlexNet's weights, {ALEXNET}, are not in torch's cache"
    try:
        import lpips
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        return f"the package lpips cannot be imported ({error})"
    network: Any = lpips.LPIPS(net="alex", version="0.1", verbose=False).eval()

    def measure(_: Prompt, reference: Drawing, candidate: Drawing) -> dict[str, Score]:
        with torch.inference_mode():
            found = network(_signed(reference.pixels), _signed(candidate.pixels))
        return {"lpips": Score(float(found))}

    return measure


def _signed(pixels: Pixels) -> torch.Tensor:
    """Return an image in the form that LPIPS takes: [1, 3, H, W] from -1 to 1."""
    return torch.from_numpy(pixels.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]


def clip_measure(folder: Path | None) -> Measure | str:
    """Return the measure with a CLIP model in transformers' layout, or what is missing."""
    if folder is None:
        return "no CLIP model was given with --clip DIR"
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        if not (folder / name).is_file():
            raise UsageError(f"--clip {folder}: {name} is missing; a CLIP model in transformers' layout is needed")
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    processor: Any = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)

    def measure(prompt: Prompt, reference: Drawing, candidate: Drawing) -> dict[str, Score]:
        words = tokenizer([prompt.text], truncation=True, return_tensors="pt")
        given = processor([Image.fromarray(d.pixels) for d in (reference, candidate)], return_tensors="pt")
        with torch.inference_mode():
            found = model(**words, **given)
        text, images = found.text_embeds, found.image_embeds  # unit length: [1, D], [2, D]
        before, after = (100 * float(score) for score in (images @ text.T).clamp(min=0).ravel())
        return {"clip_change": Score.change(before, after)}

    return measure
