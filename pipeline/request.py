"""What a request may contain: the fields of the ensemble as data, and the rules that make a checked Request."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from kit.cli import option
from kit.errors import RequestError, UsageError
from kit.image_size import MAX_PIXELS, MAX_SIDE, MIN_SIDE, PIXELS_PER_TOKEN, side_problem
from kit.variants import Variant
from pipeline.edit_fields import STRENGTH, check_edit

FieldType = Literal["TYPE_STRING", "TYPE_INT32", "TYPE_INT64", "TYPE_FP32"]
ImageFormat = Literal["png", "jpeg", "webp"]
FORMATS: tuple[ImageFormat, ...] = get_args(ImageFormat)
Encoding = Literal["bytes", "base64"]
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
TOKEN_BYTES = 64  # per token of the text length; no text in a human language comes near it
SHORT_BYTES = 64  # the longest text of a field that is not a prompt
QUOTED = 80  # characters of a value in a message


@dataclass(frozen=True)
class Field:
    """One input of the ensemble: one value, shape [1], or a list."""

    name: str
    type: FieldType
    about: str
    many: bool = False
    is_image: bool = False  # encoded images: bytes, or base64 from clients that send JSON

    @property
    def dims(self) -> tuple[int, ...]:
        """The shape in config.pbtxt, where -1 is any number."""
        return (-1,) if self.many else (1,)


FIELDS: tuple[Field, ...] = (
    Field("prompt", "TYPE_STRING", "what to generate, UTF-8"),
    Field("negative_prompt", "TYPE_STRING", "what to avoid; base variants only"),
    Field("seed", "TYPE_INT64", "0 to 2^63-1; random by default, and returned as seed_used"),
    Field("width", "TYPE_INT32", "pixels, a multiple of 16"),
    Field("height", "TYPE_INT32", "pixels, a multiple of 16"),
    Field("steps", "TYPE_INT32", "denoising steps"),
    Field("guidance", "TYPE_FP32", "guidance scale"),
    Field("num_images", "TYPE_INT32", "images generated from one seed"),
    Field("output_format", "TYPE_STRING", "png, jpeg or webp"),
    Field("response_encoding", "TYPE_STRING", "bytes, or base64 for HTTP clients: JSON cannot hold bytes"),
    Field(
        "sigmas", "TYPE_FP32", "noise levels before the time shift, as in diffusers; some LoRAs need them", many=True
    ),
    Field("images", "TYPE_STRING", "references, in the order of the prompt: PNG, JPEG or WebP", True, True),
    Field("mask", "TYPE_STRING", "an image of the size of images[0]; white is repainted", is_image=True),
    Field("strength", "TYPE_FP32", "with a mask: the share of the steps that runs"),
)


@dataclass(frozen=True)
class Limits:
    """What a deployment accepts; `serve repository` writes it into the deployment."""

    min_side: int = option(MIN_SIDE, "smallest side of an image, in pixels")
    max_side: int = option(MAX_SIDE, "largest side of an image, in pixels")
    max_pixels: int = option(MAX_PIXELS, "width x height of an image")
    max_steps: int = option(100, "denoising steps")
    max_images: int = option(4, "images of one request")
    max_guidance: float = option(20.0, "guidance scale")
    max_references: int = option(10, "reference images, or fewer where the variant takes fewer; 0: none")
    sizes: tuple[tuple[int, int], ...] = ()  # width and height of all images that the engines run; empty: any
    no_references: str = ""  # a sentence: why the artifact takes none whatever the limit is; empty: it takes them

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple((width, height) for width, height in self.sizes))  # lists, from JSON
        for name in ("min_side", "max_side"):
            if getattr(self, name) <= 0 or getattr(self, name) % PIXELS_PER_TOKEN:
                option_name, value = f"--{name.replace('_', '-')}", getattr(self, name)
                raise UsageError(f"{option_name} {value}: must be a positive multiple of {PIXELS_PER_TOKEN}")
        if self.min_side > self.max_side:
            raise UsageError(f"--min-side {self.min_side} is larger than --max-side {self.max_side}")

    @property
    def smallest(self) -> tuple[int, int]:
        """Width and height of the smallest image that is accepted."""
        return min(self.sizes, key=lambda size: size[0] * size[1], default=(self.min_side, self.min_side))


@dataclass(frozen=True)
class Request:
    """A request that passed every check, with defaults filled in."""

    prompt: str
    negative_prompt: str
    seed: int
    width: int
    height: int
    steps: int
    guidance: float
    num_images: int
    output_format: ImageFormat
    response_encoding: Encoding = "bytes"
    sigmas: tuple[float, ...] = ()  # empty: evenly spaced
    images: tuple[bytes, ...] = ()  # encoded references; with a mask the first one is repainted
    mask: bytes | None = None  # encoded; white is repainted
    strength: float = STRENGTH  # of inpainting: the share of the steps that runs


def check(fields: Mapping[str, Any], variant: Variant, limits: Limits) -> Request:
    """Check raw fields and return a Request; None or a missing field means the default.

    Raises RequestError, which names the field, its value and the rule.
    """
    known = [field.name for field in FIELDS]
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise RequestError(f"unknown field {unknown[0]!r}; there are: {', '.join(known)}")
    given = {name: value for name, value in fields.items() if value is not None}
    _check_lengths(given, variant)
    prompt = _text(given, "prompt")
    if not prompt.strip():
        raise RequestError(f"prompt: {_shown(prompt)} is empty; say what to generate")
    edit = check_edit(given, variant, limits.max_references, limits.no_references)
    side = min(max(variant.image_size, limits.min_side), limits.max_side)
    width, height = edit.size or _default_size(side, limits)
    width, height = (
        _side(name, int(given.get(name, size)), limits) for name, size in (("width", width), ("height", height))
    )
    if limits.sizes and (width, height) not in limits.sizes:
        words = ", ".join(f"{w} x {h}" for w, h in limits.sizes)
        raise RequestError(f"width x height: {width} x {height} was not compiled; this server generates {words}")
    if width * height > limits.max_pixels:
        raise RequestError(
            f"width x height: {width} x {height} is {width * height} pixels; this server generates at most "
            f"{limits.max_pixels}"
        )
    sigmas = _sigmas(given.get("sigmas"), limits)
    steps = _range("steps", int(given.get("steps", len(sigmas) or variant.steps)), 1, limits.max_steps)
    if sigmas and steps != len(sigmas):
        raise RequestError(f"steps: {steps} is not the number of sigmas, {len(sigmas)}; leave steps out")
    return Request(
        prompt=prompt,
        negative_prompt=_negative(given, variant),
        seed=_range("seed", int(given.get("seed", secrets.randbits(32))), 0, 2**63 - 1),
        width=width,
        height=height,
        steps=steps,
        guidance=_guidance(float(given.get("guidance", variant.guidance_scale)), variant, limits),
        num_images=_range("num_images", int(given.get("num_images", 1)), 1, limits.max_images),
        output_format=check_format(given.get("output_format", "png")),
        response_encoding=check_encoding(given.get("response_encoding", "bytes")),
        sigmas=sigmas,
        images=edit.images,
        mask=edit.mask,
        strength=edit.strength,
    )


def _default_size(side: int, limits: Limits) -> tuple[int, int]:
    """Return the size of an image that a request does not choose: the largest, where the variant's is not compiled."""
    if not limits.sizes or (side, side) in limits.sizes:
        return side, side
    return max(limits.sizes, key=lambda size: size[0] * size[1])


def _sigmas(value: Any, limits: Limits) -> tuple[float, ...]:
    """Check a list of noise levels: each is above 0, at most 1, and below the one before it."""
    if value is None:
        return ()
    try:
        levels = tuple(float(level) for level in value)
    except (TypeError, ValueError):
        raise RequestError(f"sigmas: {_shown(value)} is not a list of numbers") from None
    if not 1 <= len(levels) <= limits.max_steps:
        raise RequestError(f"sigmas: {len(levels)} noise levels; expected 1 to {limits.max_steps}")
    for before, level in zip((math.inf, *levels), levels, strict=False):
        if not 0 < level <= 1:
            raise RequestError(f"sigmas: {level:g} is not above 0 and at most 1")
        if level >= before:
            raise RequestError(f"sigmas: {level:g} follows {before:g}; noise levels must decrease")
    return levels


def _check_lengths(given: Mapping[str, Any], variant: Variant) -> None:
    """Reject texts that cannot be valid by their length alone, before anything reads them."""
    for field in FIELDS:
        value = given.get(field.name)
        if field.type == "TYPE_STRING" and not field.is_image and isinstance(value, (str, bytes)):
            limit = TOKEN_BYTES * variant.text_tokens if "prompt" in field.name else SHORT_BYTES
            if len(value) > limit:
                raise RequestError(f"{field.name}: {len(value)} bytes; the limit is {limit}")


def prompt_text(value: object, field: str, text_tokens: int) -> str:
    """Return a prompt as text; raises RequestError if it is none, or has too many bytes for so many tokens."""
    if isinstance(value, (str, bytes)) and len(value) > TOKEN_BYTES * text_tokens:
        raise RequestError(f"{field}: {len(value)} bytes; the limit is {TOKEN_BYTES * text_tokens}")
    return _text({field: value}, field)


def _shown(value: object) -> str:
    """Return a value as a message quotes it: in full up to 80 characters."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def _text(given: Mapping[str, Any], name: str) -> str:
    value = given.get(name, "")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise RequestError(f"{name}: byte {error.start} is not valid UTF-8") from None
    if not isinstance(value, str):
        raise RequestError(f"{name}: {_shown(value)} is not text")
    return value


def _range(name: str, value: int, low: int, high: int) -> int:
    if not low <= value <= high:
        raise RequestError(f"{name}: {value} is not between {low} and {high}")
    return value


def _side(name: str, value: int, limits: Limits) -> int:
    if problem := side_problem(value, limits.min_side, limits.max_side):
        raise RequestError(f"{name}: {problem}")
    return value


def _negative(given: Mapping[str, Any], variant: Variant) -> str:
    text = _text(given, "negative_prompt")
    if text and variant.guidance != "cfg":
        raise RequestError(
            f"negative_prompt: {_shown(text)} has no effect on {variant.name}, which runs without classifier-free "
            "guidance; leave it out"
        )
    return text


def _guidance(value: float, variant: Variant, limits: Limits) -> float:
    if not math.isfinite(value) or not 0 <= value <= limits.max_guidance:
        raise RequestError(f"guidance: {value} is not between 0 and {limits.max_guidance}")
    if variant.guidance == "none" and value != 1.0:
        raise RequestError(
            f"guidance: {value:g} has no effect on {variant.name}, which is distilled to run without it; leave it out "
            "or send 1.0"
        )
    return value


def check_format(value: object) -> ImageFormat:
    """Return the image format that a request names; raises RequestError for an unknown one."""
    name = _text({"output_format": value}, "output_format")
    for known in FORMATS:
        if name.lower() == known:
            return known
    raise RequestError(f"output_format: {_shown(name)} is not one of {', '.join(FORMATS)}")


def check_encoding(value: object) -> Encoding:
    """Return the encoding of the images that a request names; raises RequestError for an unknown one."""
    name = _text({"response_encoding": value}, "response_encoding")
    for known in ENCODINGS:
        if name.lower() == known:
            return known
    raise RequestError(f"response_encoding: {_shown(name)} is not one of {', '.join(ENCODINGS)}")
