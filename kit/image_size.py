"""Which image sizes the kit takes: sides that are whole tokens, within bounds of side and area."""

from __future__ import annotations

PIXELS_PER_TOKEN = 16  # of a side: the VAE's factor of 8 and 2x2 patches
MIN_SIDE, MAX_SIDE = 64, 2048  # pixels
MAX_PIXELS = MAX_SIDE**2  # 4 megapixels, the most that the family was made for
MIN_TOKENS, MAX_TOKENS = (MIN_SIDE // PIXELS_PER_TOKEN) ** 2, MAX_PIXELS // PIXELS_PER_TOKEN**2


def side_problem(side: int, low: int = MIN_SIDE, high: int = MAX_SIDE) -> str | None:
    """Say why an image cannot have a side of so many pixels, and the nearest sides that it can have; None when it can.

    The sentence begins with the value, so that a caller can put the field or the option before it.
    """
    if not low <= side <= high:
        return f"{side} is not between {low} and {high} pixels"
    if side % PIXELS_PER_TOKEN:
        below = side - side % PIXELS_PER_TOKEN
        return f"{side} is not a multiple of {PIXELS_PER_TOKEN}; nearest: {below} or {below + PIXELS_PER_TOKEN}"
    return None


def size_problem(width: int, height: int, min_tokens: int = MIN_TOKENS, max_tokens: int = MAX_TOKENS) -> str | None:
    """Say why an image of `width` x `height` does not pass through profiles, and the nearest size that does."""
    step = PIXELS_PER_TOKEN
    if width % step or height % step or min(width, height) < step:
        near = [max(step, round(side / step) * step) for side in (width, height)]
        return f"{width}x{height}: sides must be multiples of {step}; nearest: {near[0]}x{near[1]}"
    tokens = (width // step) * (height // step)
    if min_tokens <= tokens <= max_tokens:
        return None
    near_width, near_height = _nearest_size(width, height, min_tokens, max_tokens)
    return (
        f"{width}x{height} has {tokens} image tokens, the profiles accept {min_tokens} to {max_tokens}; "
        f"nearest: {near_width}x{near_height}"
    )


def _nearest_size(width: int, height: int, low: int, high: int) -> tuple[int, int]:
    """Scale a size into a range of tokens; its aspect is kept as far as whole tokens allow."""
    step = PIXELS_PER_TOKEN
    columns, lines = width // step, height // step
    target = min(max(columns * lines, low), high)
    scale = (target / (columns * lines)) ** 0.5
    candidates = [
        (c, n)
        for c in range(max(1, int(columns * scale) - 1), int(columns * scale) + 3)
        for n in range(max(1, int(lines * scale) - 1), int(lines * scale) + 3)
        if low <= c * n <= high
    ]
    wanted = columns / lines
    best = min(candidates, key=lambda cn: abs(cn[0] * cn[1] - target) / target + abs(cn[0] / cn[1] / wanted - 1))
    return best[0] * step, best[1] * step
