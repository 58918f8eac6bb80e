"""The arithmetic of scales and codes, against values computed by hand and against torchao's primitives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from kit.recipes import SCHEMES
from kit.safetensors_file import read_header
from quantize.conversions import Quantized, convert
from quantize.scales import LARGEST, SMALLEST_SCALE, NotFinite, amax, decode, encode, pack_int4, scale_of

REFERENCE = Path(sys.prefix) / "reference" / "torchao"
FORMS = ["fp8", "fp8-channel", "int8", "int8-tensor", "int4-weights"]
# Quantizes the same weights with torchao, in a separate process: importing it here would slow down diffusers.
SCRIPT = """
import sys, torch
from safetensors.torch import load_file, save_file
from torchao.quantization import quant_primitives as ao

weights, made = load_file(sys.argv[1])["w"], {}
n, k = weights.shape
for form, number, block in (
    ("fp8", "fp8", (n, k)), ("fp8-channel", "fp8", (1, k)),
    ("int8", "int8", (1, k)), ("int8-tensor", "int8", (n, k)), ("int4-weights", "int4", (1, 64)),
):
    if number == "fp8":
        largest = weights.abs().amax() if block[0] == n else weights.abs().amax(1, keepdim=True)
        scale = (largest / 448).float()
        codes = ao._quantize_affine_float8(weights, scale, torch.float8_e4m3fn).view(torch.uint8)
    else:
        low, high = {"int8": (-127, 127), "int4": (-7, 7)}[number]
        scale, zero = ao.choose_qparams_affine(
            weights, ao.MappingType.SYMMETRIC, block, torch.int8, low, high,
            scale_dtype=torch.float32, zero_point_dtype=torch.int32, eps=1e-30,
        )
        codes = ao.quantize_affine(weights, block, scale, zero, torch.int8, low, high)
    made[form + ".scale"], made[form + ".codes"] = scale.contiguous(), codes.contiguous()
save_file(made, sys.argv[2])
"""


def test_the_largest_magnitude_becomes_the_largest_code() -> None:
    values = torch.tensor([[-3.0, 1.5, 0.0], [0.25, 0.125, -0.5]])
    scale = scale_of(amax(values, 1), "int8")
    assert scale.tolist() == pytest.approx([3 / 127, 0.5 / 127])
    codes = encode(values, scale[:, None], "int8")
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[-127, 64, 0], [64, 32, -127]]  # 63.5 and 31.75: ties go to even
    assert torch.equal(decode(codes, scale[:, None])[:, 2], torch.tensor([0.0, -0.5]))


def test_fp8_has_its_largest_code_at_448_and_no_code_is_nan() -> None:
    values = torch.randn(64, 64) * 1e4
    codes = encode(values, scale_of(amax(values), "fp8"), "fp8")
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.float().abs().max() == 448
    assert torch.isfinite(codes.float()).all()
    assert torch.isfinite(encode(values, torch.tensor(1e-3), "fp8").float()).all()  # clipped, not overflown


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38])
def test_a_scale_is_positive_for_any_magnitude(largest: float) -> None:
    for number in LARGEST:
        scale = scale_of(torch.tensor(largest), number)
        assert scale >= SMALLEST_SCALE
        assert torch.isfinite(scale.reciprocal())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dim", [None, 1])
def test_values_that_are_not_finite_have_no_largest_magnitude(bad: float, dim: int | None) -> None:
    values = torch.ones(3, 4)
    values[1, 2] = bad
    with pytest.raises(NotFinite, match="contains NaN or infinity"):
        amax(values, dim)


def test_int4_codes_are_packed_as_onnx_packs_them() -> None:
    codes = torch.randint(-7, 8, (6, 10), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    packed = pack_int4(codes)
    assert packed.shape == (6, 5)
    unpacked = onnx.numpy_helper.to_array(
        onnx.TensorProto(data_type=onnx.TensorProto.INT4, dims=(6, 10), raw_data=packed.numpy().tobytes())
    )
    assert np.array_equal(unpacked.astype(np.int8), codes.numpy())


@pytest.mark.skipif(
    not (REFERENCE / "torchao").is_dir(), reason="torchao is not at .venv/reference/torchao; `make env` puts it"
)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_codes_and_scales_match_torchao(tmp_path: Path, scale: float) -> None:
    """Scales are equal up to rounding; at most one code in 10,000 differs, at a rounding boundary."""
    random = torch.Generator().manual_seed(1)
    weights = torch.randn(96, 256, generator=random) * torch.rand(96, 1, generator=random) * scale
    weights[7, 3] = 40 * scale  # an outlier
    save_file({"w": weights}, tmp_path / "in.safetensors")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, tmp_path / "in.safetensors", tmp_path / "torchao.safetensors"],
        env={**os.environ, "PYTHONPATH": str(REFERENCE)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stderr
    theirs = load_file(tmp_path / "torchao.safetensors")
    source = read_header(tmp_path / "in.safetensors")["w"]
    for form in FORMS:
        scheme = SCHEMES[form]
        job = Quantized((source,), scheme, (1.0,))
        convert([job], tmp_path / f"{form}.safetensors")
        ours = load_file(tmp_path / f"{form}.safetensors")
        codes, found = ours[job.codes_name], ours[job.scales_name]
        if scheme.weights == "int4":
            codes = torch.stack([codes & 0x0F, codes >> 4], -1).view(256, 96).to(torch.int16)
            codes = torch.where(codes > 7, codes - 16, codes)
        if scheme.weights == "fp8":
            codes = codes.view(torch.uint8)
        expected = theirs[f"{form}.scale"]
        expected = expected.mT if found.ndim == 2 else expected.view(found.shape)
        assert torch.allclose(found, expected, rtol=1e-6, atol=0), form
        difference = (codes.T.to(torch.int16) - theirs[f"{form}.codes"].to(torch.int16)).abs()
        assert difference.max() <= 1, f"{form}: codes differ by {difference.max()}"
        assert (difference > 0).float().mean() <= 1e-4, f"{form}: {int((difference > 0).sum())} codes differ"
