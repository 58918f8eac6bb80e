"""Images that clients send are decoded as diffusers' `load_image` decodes them, or refused by a sentence."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers.utils import load_image
from PIL import Image, ImageFile

from kit.errors import RequestError
from pipeline import pictures
from pipeline.pictures import decode_rgb, read_size


def noise(height: int = 70, width: int = 90, channels: int = 3) -> Image.Image:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, shape, np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(noise(), form, exif=exif)


def palette() -> Image.Image:
    return noise().quantize(16)


TAKEN: dict[str, Callable[[], bytes]] = {
    "png": lambda: encoded(noise()),
    "jpeg": lambda: encoded(noise(), "JPEG"),
    "webp": lambda: encoded(noise(), "WEBP"),
    "alpha": lambda: encoded(noise(channels=4)),
    "grey": lambda: encoded(noise(channels=1)),
    "palette": lambda: encoded(palette()),
    "palette with a transparent colour": lambda: encoded(palette(), transparency=3),
    "cmyk": lambda: encoded(noise().convert("CMYK"), "JPEG"),
    "black and white": lambda: encoded(noise().convert("1")),
    **{f"orientation {n} of a {form}": lambda n=n, form=form: turned(n, form)  # type: ignore[misc]
       for n in range(1, 9) for form in ("JPEG", "PNG", "WEBP")},
}  # fmt: skip


@pytest.mark.parametrize("kind", TAKEN)
def test_pixels_and_size_are_those_of_load_image(kind: str, tmp_path: Path) -> None:
    data = TAKEN[kind]()
    (tmp_path / "image").write_bytes(data)
    theirs, ours = load_image(str(tmp_path / "image")), decode_rgb(data, "images[0]")
    assert ours.mode == theirs.mode == "RGB"
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    assert read_size(data, "images[0]") == ours.size


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_a_size_is_read_without_decoding_pixels(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, upright = encoded(noise(), form), turned(6, form)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert read_size(plain, "images[0]") == (90, 70)
    assert read_size(upright, "images[0]") == (70, 90)


def test_an_orientation_behind_the_pixels_of_a_png_counts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = turned(6, "PNG")
    at, end = data.index(b"eXIf") - 4, data.index(b"IEND") - 4
    length = 12 + int.from_bytes(data[at : at + 4], "big")
    late = data[:at] + data[at + length : end] + data[at : at + length] + data[end:]
    (tmp_path / "image").write_bytes(late)
    theirs = load_image(str(tmp_path / "image"))
    assert np.array_equal(np.asarray(decode_rgb(late, "images[0]")), np.asarray(theirs))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert read_size(late, "images[0]") == theirs.size == (70, 90)


def test_a_png_of_nothing_but_chunks_is_refused() -> None:
    data = encoded(noise())
    end = data.index(b"IEND") - 4
    with pytest.raises(RequestError, match="images\\[0\\]: the image is damaged or truncated: more than 20000 chunks"):
        read_size(data[:end] + b"\0\0\0\0teSt\0\0\0\0" * 20_001 + data[end:], "images[0]")


def test_grey_of_16_bits_keeps_its_upper_8() -> None:
    deep = np.arange(0, 65536, 8, dtype=np.uint16).reshape(64, 128)
    ours = np.asarray(decode_rgb(encoded(Image.fromarray(deep)), "images[0]"))
    assert np.array_equal(ours, np.repeat((deep >> 8).astype(np.uint8)[..., None], 3, axis=2))


def animated(form: str) -> bytes:
    frames = [noise(), noise().transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
    return encoded(frames[0], form, save_all=True, append_images=frames[1:])


def huge() -> bytes:
    """A PNG of a few hundred kilobytes that decodes to 100 megapixels."""
    return encoded(Image.new("1", (10_000, 10_000)))


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "images\\[2\\]: 0 bytes; expected a PNG, JPEG or WebP image"),
    "a text": (lambda: b"a red fox", "images\\[2\\]: 9 bytes that are not a PNG, JPEG or WebP image"),
    "a GIF": (lambda: encoded(noise(), "GIF"), "bytes that are not a PNG, JPEG or WebP image"),
    "a TIFF": (lambda: encoded(noise(), "TIFF"), "bytes that are not a PNG, JPEG or WebP image"),
    "a header alone": (lambda: encoded(noise())[:20], "not a PNG, JPEG or WebP image|damaged or truncated"),
    "100 megapixels": (huge, "100000000 pixels; the limit is 50000000|exceeds the limit of 50000000 pixels"),
    "an animated PNG": (lambda: animated("PNG"), "images\\[2\\]: the image is animated; send one frame"),
    "an animated WebP": (lambda: animated("WEBP"), "images\\[2\\]: the image is animated; send one frame"),
}


@pytest.mark.parametrize("read", [read_size, decode_rgb])
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_is_refused_by_a_sentence(kind: str, read: Callable[[bytes, str], object]) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(RequestError, match=message):
        read(make(), "images[2]")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_refused_when_it_is_decoded(form: str, share: float) -> None:
    data = encoded(noise(), form)
    with pytest.raises(RequestError, match="images\\[0\\]: "):
        decode_rgb(data[: int(len(data) * share)], "images[0]")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_damaged_files_raise_nothing_else(form: str) -> None:
    data = bytearray(encoded(noise(), form))
    random = np.random.default_rng(3)
    for _ in range(200):
        broken = bytearray(data)
        for place in random.integers(0, len(data), 4):
            broken[place] = random.integers(0, 256)
        try:
            outcome = decode_rgb(bytes(broken), "images[0]").mode
        except RequestError as error:
            outcome = str(error)[:11]
        assert outcome in ("RGB", "images[0]: ")


def test_a_bomb_is_refused_before_its_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise())
    monkeypatch.setattr(pictures, "MAX_DECODED_PIXELS", 1000)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="90 x 70 is 6300 pixels; the limit is 1000"):
        decode_rgb(data, "images[0]")


def test_bytes_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 10)
    with pytest.raises(RequestError, match="mask: 11 bytes; the limit is 10"):
        read_size(b"\x89PNG_______", "mask")


def test_floating_point_pixels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "FORMATS", ("TIFF",))  # none of the accepted formats stores them today
    with pytest.raises(RequestError, match="32-bit pixels"):
        read_size(encoded(Image.new("F", (64, 64)), "TIFF"), "images[0]")


def test_further_pictures_behind_a_jpeg_are_ignored() -> None:
    data = encoded(noise(), "MPO", save_all=True, append_images=[noise(64, 64)])
    assert decode_rgb(data, "images[0]").size == (90, 70)
