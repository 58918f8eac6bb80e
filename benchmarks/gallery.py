"""Generate a grid of prompts and images with a real Triton server and the sample checkpoint.

python -m benchmarks gallery --deployment build/sample-deploy --out benchmarks/results/gallery.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from benchmarks import machine

PROMPTS = (
    "a red circle left of a blue square on a white background",
    "a green triangle above a yellow circle on a black background, with the word HELLO",
    "a large purple square on a gray background, with the word STONE",
    "a small orange circle right of a green square on a white background",
    "a cyan cross above a pink heart on a brown background, with the word FLUX",
    "a blue circle on a white background, with the word CAT",
)
CAPTION_PIXELS = 44  # below each image
COLUMNS = 3
ENLARGE = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--deployment",
        type=Path,
        default=Path("build/sample-deploy"),
        metavar="DEPLOY",
        help="what `serve repository` wrote",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/gallery.png"), metavar="FILE", help="the image to write"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Start a server, generate an image for every prompt with its index as the seed, and save the grid."""
    from pipeline.images import decode
    from serve.client import Client
    from serve.launch import Server

    rows = []
    tiles = []
    with Server(args.deployment, log=args.deployment.parent / "gallery.log") as server, Client(server.url) as client:
        for seed, prompt in enumerate(PROMPTS):
            images = client.generate({"prompt": prompt, "seed": seed}, timeout=120)
            tiles.append(captioned(Image.fromarray(decode(images.images[0])), prompt))
            rows.append({"prompt": prompt, "seed": seed, "seconds": round(images.seconds, 3)})
    grid(tiles).save(args.out)
    return {"benchmark": "gallery", "machine": machine.describe(), "image": str(args.out), "rows": rows}


def table(facts: dict[str, Any]) -> str:
    """Render the rows as text."""
    return "\n".join(f"{row['seconds']:6.2f} s  seed {row['seed']}  {row['prompt']}" for row in facts["rows"])


def captioned(image: Image.Image, prompt: str) -> Image.Image:
    """Enlarge an image without smoothing and write its prompt below it."""
    width, height = image.width * ENLARGE, image.height * ENLARGE
    tile = Image.new("RGB", (width, height + CAPTION_PIXELS), "white")
    tile.paste(image.resize((width, height), Image.Resampling.NEAREST))
    pen = ImageDraw.Draw(tile)
    lines = [""]
    for word in prompt.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer) > width - 8:
            lines.append(word)
        else:
            lines[-1] = longer
    pen.multiline_text((4, height + 4), "\n".join(lines), fill="black", spacing=2)
    return tile


def grid(tiles: list[Image.Image]) -> Image.Image:
    """Arrange tiles of equal size in rows."""
    width, height = tiles[0].size
    rows = -(-len(tiles) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * (width + 8) - 8, rows * (height + 8) - 8), "white")
    for index, tile in enumerate(tiles):
        sheet.paste(tile, (index % COLUMNS * (width + 8), index // COLUMNS * (height + 8)))
    return sheet
