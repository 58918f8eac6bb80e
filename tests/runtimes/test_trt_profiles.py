"""Optimization profiles: derived from ports by token count, given by the user, and chosen at run time."""

from __future__ import annotations

from typing import Any

import pytest

from kit.errors import UsageError
from kit.ports import ALL_PARTS, Ports, ports
from kit.variants import VARIANTS, Variant
from runtimes.trt.profiles import AxisRange, Profile, Sizing, axes_of, choose, derive, stated

KLEIN = VARIANTS["klein-4b"]
REFERENCE = AxisRange(16, 4096, 4096)


def of(part: Any, variant: Variant = KLEIN) -> Ports:
    return ports(part, variant, "bf16")


def test_the_transformer_has_a_profile_per_bucket_without_gaps() -> None:
    tokens = [p.axes["image_tokens"] for p in derive(of("transformer"), Sizing())]
    assert [(r.low, r.best, r.high) for r in tokens] == [
        (16, 256, 256),
        (257, 1024, 1024),
        (1025, 4096, 4096),
        (4097, 9216, 9216),
        (9217, 16384, 16384),
    ]


def test_larger_images_take_fewer_rows_so_that_one_call_never_has_more_tokens() -> None:
    made = derive(of("transformer"), Sizing(max_batch=8))
    assert [p.axes["batch"].high for p in made] == [8, 8, 8, 3, 2]
    assert all(p.axes["batch"].best == 1 for p in made)


def test_the_vae_bounds_both_sides_and_the_text_encoder_only_its_batch() -> None:
    first, *_, last = derive(of("vae_decoder"), Sizing())
    assert first.axes["latent_height"] == first.axes["latent_width"] == AxisRange(4, 16, 16)
    assert last.axes["latent_width"] == AxisRange(4, 128, 128)
    (text,) = derive(of("text_encoder"), Sizing(max_batch=3))
    assert text.axes == {"batch": AxisRange(1, 1, 3)}


def test_reference_images_widen_every_bucket_by_a_megapixel_each() -> None:
    made = derive(of("transformer"), Sizing(sides=(512, 1024), references=2))
    assert [p.axes["image_tokens"] for p in made] == [
        AxisRange(16, 1024, 1024 + 8192),
        AxisRange(1025, 4096, 4096 + 8192),
    ]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("part", ALL_PARTS)
def test_every_profile_gives_every_input_its_shapes(name: str, part: Any) -> None:
    wanted = of(part, VARIANTS[name])
    for profile in derive(wanted, Sizing()):
        for port in wanted.inputs:
            low, best, high = profile.shapes(port)
            assert len(low) == len(port.dims)
            assert all(a <= b <= c for a, b, c in zip(low, best, high, strict=True))


def test_the_cache_of_references_has_an_axis_of_its_own_from_one_image_on() -> None:
    variant = VARIANTS["klein-9b-kv"]
    (cached,) = derive(of("transformer_cached", variant), Sizing(sides=(1024,)))
    assert dict(cached.axes) == {
        "batch": AxisRange(1, 1, 4),
        "image_tokens": AxisRange(16, 4096, 4096),
        "ref_tokens": REFERENCE,
    }
    (extract,) = derive(of("transformer_extract", variant), Sizing(sides=(1024,), references=3))
    assert dict(extract.axes) == {"batch": AxisRange(1, 1, 1), "ref_tokens": AxisRange(16, 4096, 3 * 4096)}


def test_a_stated_profile_replaces_the_derived_ones() -> None:
    made = stated("transformer", "batch=2, image_tokens=256..1024..4096", of("transformer"), "mine")
    assert made == Profile("mine", {"batch": AxisRange(2, 2, 2), "image_tokens": AxisRange(256, 1024, 4096)})
    assert stated("text_encoder", "batch=1..4", of("text_encoder"), "b").axes["batch"] == AxisRange(1, 4, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch=1..4", "no range for image_tokens; the transformer has: batch, image_tokens"),
        ("batch=1,image_token=4", "the transformer has no axis 'image_token'; it has: batch, image_tokens"),
        ("batch", "the transformer has no axis 'batch'"),
        ("batch=1..2..3..4,image_tokens=1", r"batch=1..2..3..4 is not low..high or low..best..high"),
        ("batch=a..4,image_tokens=1", "batch=a..4 is not low..high"),
        ("batch=4..1,image_tokens=1", "range 4..1..1: must be 1 <= low <= best <= high"),
        ("batch=0..1,image_tokens=1", "must be 1 <= low"),
    ],
)
def test_an_invalid_profile_of_the_user_is_rejected(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        stated("transformer", text, of("transformer"), "mine")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"sides": (250,)}, "side 250 is not a multiple of 16; nearest: 240 or 256"),
        ({"sides": (4096,)}, "side 4096 is not between 16 and 2048 pixels"),
        ({"sides": (512, 256)}, "sides 512, 256: must ascend"),
        ({"sides": ()}, "sides none: must ascend"),
        ({"sides": (32,)}, "side 32 is smaller than the smallest side 64"),
        ({"max_batch": 0}, "max batch 0: must be at least 1"),
        ({"references": 11}, "references 11: must be between 0 and 10"),
    ],
)
def test_invalid_sizes_are_rejected_with_the_nearest(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Sizing(**changed)


def test_the_smallest_profile_that_accepts_an_image_is_chosen_and_a_batch_may_be_split() -> None:
    made = derive(of("transformer"), Sizing())
    assert made[choose(made, {"batch": 1, "image_tokens": 4096})].name == "1024"
    assert made[choose(made, {"batch": 1, "image_tokens": 4097})].name == "1536"
    assert made[choose(made, {"batch": 9, "image_tokens": 16384})].name == "2048"
    with pytest.raises(
        UsageError, match=r"no profile of the engine accepts image_tokens 20000; it has: 256 \(batch 1..4"
    ):
        choose(made, {"batch": 1, "image_tokens": 20000})


def test_axes_are_those_of_the_inputs() -> None:
    assert axes_of(of("vae_encoder")) == ("batch", "latent_height", "latent_width")
