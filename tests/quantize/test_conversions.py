"""Conversion of weights to the quantized file: exactness, memory, and errors that name the tensor."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kit.errors import ArtifactError
from kit.recipes import SCHEMES
from kit.safetensors_file import StoredTensor, read_header
from quantize import conversions
from quantize.conversions import Kept, Quantized, convert

MB = 1 << 20
# 12 matrices of 128 MB, 1.5 GB in total; every fourth is quantized. The file is sparse and takes no disk space.
SCRIPT = """
import resource, sys
from pathlib import Path
from kit.safetensors_file import read_header
from kit.recipes import SCHEMES
from quantize.conversions import Kept, Quantized, convert

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, seen = peak(), []
found = read_header(Path(sys.argv[1])).values()
jobs = [Kept(one) if i % 4 else Quantized((one,), SCHEMES["int8"], (1.0,)) for i, one in enumerate(found)]
convert(jobs, Path(sys.argv[2]), seen.append)
print(before, peak(), sum(seen))
"""


def stored(folder: Path, **tensors: Tensor) -> dict[str, StoredTensor]:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "in.safetensors")
    return read_header(folder / "in.safetensors")


def made(folder: Path, *jobs: conversions.Conversion) -> dict[str, Tensor]:
    convert(jobs, folder / "out.safetensors")
    return dict(load_file(folder / "out.safetensors"))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_part_of_one_and_a_half_gigabytes_takes_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    size, count, header = 128 * MB, 12, {}
    for i in range(count):
        header[f"w{i}"] = {"dtype": "F32", "shape": [4096, 8192], "data_offsets": [i * size, (i + 1) * size]}
    text = json.dumps(header).encode()
    with (tmp_path / "in.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * size)
    words = [sys.executable, "-c", SCRIPT, str(tmp_path / "in.safetensors"), str(tmp_path / "out.safetensors")]
    run = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    before, peak, told = (int(word) for word in run.stdout.split())
    assert told == count * size
    assert peak - before < 300, f"peak {peak} MB, {before} MB before it began"
    assert (tmp_path / "out.safetensors").stat().st_size > count * size * 3 // 4
    (tmp_path / "out.safetensors").unlink()


@pytest.mark.parametrize("scheme", ["int8", "int8-tensor", "fp8", "fp8-channel", "int4-weights"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_weight_that_is_not_finite_is_rejected_by_name(tmp_path: Path, scheme: str, bad: float) -> None:
    weight = noise(32, 64)
    weight[31, 63] = bad
    sources = stored(tmp_path, good=noise(32, 64), bad=weight)
    jobs = [Quantized((sources["good"], sources["bad"]), SCHEMES[scheme], (1.0, 1.0))]
    with pytest.raises(ArtifactError, match=r"in\.safetensors: tensor 'bad' contains NaN or infinity; it cannot be q"):
        made(tmp_path, *jobs)


def test_a_file_that_ends_too_early_is_rejected_by_name(tmp_path: Path) -> None:
    source = stored(tmp_path, w=noise(32, 64))["w"]
    content = source.file.read_bytes()
    source.file.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"in\.safetensors: ends within tensor 'w'; the file is truncated"):
        made(tmp_path, Quantized((source,), SCHEMES["int8"], (1.0,)))


@pytest.mark.parametrize("scheme", ["int8", "int8-tensor", "fp8", "fp8-channel", "int4-weights"])
def test_zeros_stay_zeros_with_a_positive_scale(tmp_path: Path, scheme: str) -> None:
    for weight in (torch.zeros(32, 64), noise(32, 64) * (torch.arange(32)[:, None] % 3 > 0)):
        job = Quantized((stored(tmp_path, w=weight)["w"],), SCHEMES[scheme], (1.0,))
        tensors = made(tmp_path, job)
        assert tensors[job.scales_name].min() > 0
        codes = tensors[job.codes_name].float()  # two int4 codes of zero make a byte of zero
        assert (codes.mT[weight.abs().amax(1) == 0] == 0).all() if scheme != "int4-weights" else True
        assert codes.any() == weight.any()


@pytest.mark.parametrize("n", [17, 33])
def test_an_odd_number_of_outputs_is_fine_for_int8(tmp_path: Path, n: int) -> None:
    weight = noise(n, 48)
    job = Quantized((stored(tmp_path, w=weight)["w"],), SCHEMES["int8"], (1.0,))
    tensors = made(tmp_path, job)
    assert tensors[job.codes_name].shape == (48, n)
    restored = (tensors[job.codes_name] * tensors[job.scales_name]).mT
    assert ((restored - weight).abs() <= tensors[job.scales_name][:, None] * 0.5001).all()


def test_a_matrix_in_pieces_gives_the_same_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = stored(tmp_path, a=noise(48, 128), b=noise(16, 128, seed=1))
    for scheme in SCHEMES.values():
        job = Quantized((sources["a"], sources["b"]), scheme, (1.0, 1.0))
        whole = made(tmp_path, job)
        monkeypatch.setattr(conversions, "CHUNK_VALUES", 5 * 128)
        pieces = made(tmp_path, job)
        monkeypatch.undo()
        assert all(torch.equal(whole[name].float(), pieces[name].float()) for name in whole)


def test_layers_of_one_product_are_concatenated(tmp_path: Path) -> None:
    a, b = noise(32, 64), 100 * noise(16, 64, seed=1)
    sources = stored(tmp_path, a=a, b=b)
    for name in ("int8", "int4-weights", "fp8-channel"):
        joined = Quantized((sources["a"], sources["b"]), SCHEMES[name], (1.0, 1.0))
        assert joined.name == "a+1"
        alone = [Quantized((source,), SCHEMES[name], (1.0,)) for source in sources.values()]
        tensors = made(tmp_path, joined, *alone)
        for made_of in ("codes_name", "scales_name"):
            parts = [tensors[getattr(job, made_of)] for job in alone]
            if parts[0].dtype == torch.float8_e4m3fn:
                parts = [part.view(torch.uint8) for part in parts]
            assert torch.equal(tensors[getattr(joined, made_of)].view(parts[0].dtype), torch.cat(parts, -1))


def test_factors_of_columns_and_rows_and_a_source_scale_multiply_what_is_quantized(tmp_path: Path) -> None:
    weight = noise(32, 64)
    columns, rows = torch.exp2(torch.arange(64) % 5 - 2.0), torch.exp2(torch.arange(32) % 3 - 1.0)
    sources = stored(tmp_path, plain=weight, folded=weight * columns * rows[:, None] * 0.375)
    jobs = [
        replace(Quantized((sources["plain"],), SCHEMES["int8"], (0.375,)), columns=columns, rows=rows),
        Quantized((sources["folded"],), SCHEMES["int8"], (1.0,)),
    ]
    tensors = made(tmp_path, *jobs)
    assert torch.equal(tensors[jobs[0].codes_name], tensors[jobs[1].codes_name])
    assert torch.equal(tensors[jobs[0].scales_name], tensors[jobs[1].scales_name])


def test_bf16_and_fp16_sources_give_the_same_as_their_fp32_values(tmp_path: Path) -> None:
    weight = noise(32, 64).bfloat16().clamp(-2, 2).half().bfloat16()
    sources = stored(tmp_path, a=weight, b=weight.half(), c=weight.float())
    jobs = [Quantized((source,), SCHEMES["fp8"], (1.0,)) for source in sources.values()]
    tensors = made(tmp_path, *jobs)
    codes = [tensors[job.codes_name].view(torch.uint8) for job in jobs]
    assert torch.equal(codes[0], codes[2])
    assert torch.equal(codes[1], codes[2])


def test_kept_tensors_are_copied_byte_by_byte_or_scaled_by_powers_of_two(tmp_path: Path) -> None:
    tensors = {"norm": noise(64).bfloat16(), "bias": noise(7), "scalar": torch.tensor(3.0), "big": noise(100, 100)}
    sources = stored(tmp_path, **tensors)
    factors = torch.exp2(torch.arange(64) % 7 - 3.0)
    found = made(tmp_path, *(Kept(source, factors if name == "norm" else None) for name, source in sources.items()))
    assert torch.equal(found.pop("norm"), tensors.pop("norm") * factors.bfloat16())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_every_tensor_is_aligned_to_its_items(tmp_path: Path) -> None:
    sources = stored(tmp_path, odd=noise(17, 33), half=noise(3).bfloat16(), wide=noise(5))
    odd = Quantized((sources["odd"],), SCHEMES["int8"], (1.0,))
    jobs: list[conversions.Conversion] = [odd, Kept(sources["half"]), Kept(sources["wide"])]
    for tensor in convert(jobs, tmp_path / "out.safetensors").values():
        assert tensor.offset % {"I8": 1, "BF16": 2, "F32": 4}[tensor.dtype] == 0
