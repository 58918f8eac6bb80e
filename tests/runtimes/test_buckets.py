"""Choosing the package of a call."""

from __future__ import annotations

import pytest

from kit.ports import ports
from kit.variants import VARIANTS
from runtimes.aoti.buckets import Call, calls, sizes_of

TRANSFORMER = ports("transformer", VARIANTS["klein-4b"], "bf16")
SHAPES = {
    "hidden_states": (3, 256, 128),
    "encoder_hidden_states": (3, 512, 7680),
    "timestep": (3,),
    "img_ids": (3, 256, 4),
    "txt_ids": (3, 512, 4),
}
BUCKETS = [{"batch": 4, "image_tokens": 256}, {"batch": 1, "image_tokens": 256}, {"batch": 1, "image_tokens": 64}]


def test_sizes_are_read_from_the_shapes() -> None:
    assert sizes_of(TRANSFORMER, SHAPES) == {"batch": 3, "image_tokens": 256}


def test_a_multiple_of_an_axis_is_divided() -> None:
    encoder = ports("vae_encoder", VARIANTS["klein-4b"], "bf16")
    sizes = sizes_of(encoder, {"image": (1, 3, 64, 96)})
    assert sizes == {"batch": 1, "latent_height": 4, "latent_width": 6}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"timestep": (2,)}, r"timestep: shape \[2\] is not \[batch\] with batch 3, image_tokens 256"),
        ({"img_ids": (3, 256)}, r"img_ids: shape \[3, 256\] is not \[batch, image_tokens, 4\]"),
        ({"encoder_hidden_states": (3, 77, 7680)}, r"encoder_hidden_states: shape \[3, 77, 7680\] is not"),
    ],
)
def test_a_shape_that_does_not_fit_its_port_is_named(changes: dict[str, tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sizes_of(TRANSFORMER, SHAPES | changes)


def test_a_missing_input_is_named() -> None:
    with pytest.raises(ValueError, match="input timestep is missing; the part takes hidden_states, "):
        sizes_of(TRANSFORMER, {name: shape for name, shape in SHAPES.items() if name != "timestep"})


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (1, [Call(1, 0, 1)]),
        (3, [Call(0, 0, 3)]),  # padded to 4
        (4, [Call(0, 0, 4)]),
        (9, [Call(0, 0, 4), Call(0, 4, 8), Call(1, 8, 9)]),
    ],
)
def test_rows_use_the_smallest_package_that_fits(rows: int, wanted: list[Call]) -> None:
    assert list(calls(BUCKETS, {"batch": rows, "image_tokens": 256})) == wanted


def test_a_size_without_a_package_is_rejected_with_the_compiled_sizes() -> None:
    with pytest.raises(
        LookupError,
        match="no package was compiled for image_tokens 96; there are: image_tokens 256; image_tokens 64. Compile the "
        "artifact with --sizes that include it",
    ):
        list(calls(BUCKETS, {"batch": 1, "image_tokens": 96}))
