"""The keys of the store: digests of everything that a value was computed from.

`checkpoint` identifies the weights and the precision; two deployments never share a key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

Role = Literal["reference", "base"]  # base: the image that is repainted, which is scaled where others are cropped


def prompt_key(checkpoint: str, text: str) -> str:
    """Return the key of a text's embeddings: the text decides its token ids."""
    return _key("prompt", checkpoint, text.encode())


def image_key(checkpoint: str, image: bytes, size: tuple[int, int], role: Role) -> str:
    """Return the key of an encoded image's latents; `size` is width and height of what is encoded."""
    return _key("latents", checkpoint, role.encode(), f"{size[0]}x{size[1]}".encode(), image)


def memory_key(checkpoint: str, images: Sequence[str]) -> str:
    """Return the key of the keys and values of references, by the keys of their latents in order."""
    return _key("keys_values", checkpoint, *(image.encode() for image in images))


def _key(kind: str, checkpoint: str, *parts: bytes) -> str:
    """Digest the parts one by one, so that no two lists of parts have the same bytes."""
    digests = b"".join(hashlib.sha256(part).digest() for part in (checkpoint.encode(), *parts))
    return f"{kind}:{hashlib.sha256(digests).hexdigest()}"
