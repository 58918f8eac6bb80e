"""Thousands of renamed tensors in a single file: each file gives the same weights as before, or is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from export.weights import find
from kit import safetensors_file
from kit.configs import read_variant
from kit.variants import Variant
from tests.conftest import ByFamily
from tests.export.bfl import to_bfl
from tests.kit.test_fuzz import refusal

Source = tuple[Path, Variant, Path, dict[str, tuple[int, ...]]]
WORDS = ("model", "diffusion_model", "transformer", "vae", "weight", "double_blocks", "0", "img_in", "scaled_fp8", "")


@pytest.fixture(scope="module")
def source(checkpoint_of: ByFamily, tmp_path_factory: pytest.TempPathFactory) -> Source:
    checkpoint = checkpoint_of("klein")
    folder = checkpoint / "transformer"
    file = tmp_path_factory.mktemp("fuzz") / "whole.safetensors"
    save_file(to_bfl(load_file(folder / "diffusion_pytorch_model.safetensors")), file)
    shapes = {name: tensor.shape for name, tensor in safetensors_file.read_folder(folder).items()}
    return checkpoint, read_variant(checkpoint), file, shapes


def ranges(source: Source, file: Path) -> dict[str, tuple[int, int]]:
    """Return the bytes that each weight is read from, relative to the data."""
    checkpoint, variant, _, shapes = source
    binding = find("transformer", variant, checkpoint, shapes, file)
    start = 8 + struct.unpack("<Q", file.read_bytes()[:8])[0]
    stored = {**binding.tensors, **{name: derived.source for name, derived in binding.derived.items()}}
    return {name: (tensor.offset - start, tensor.nbytes) for name, tensor in stored.items()}


@settings(max_examples=400, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_file_with_a_renamed_or_repeated_tensor_is_read_as_before_or_refused(
    source: Source, data: st.DataObject
) -> None:
    raw = source[2].read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    key = data.draw(st.sampled_from(sorted(set(header) - {"__metadata__"})))
    words = key.split(".")
    index = data.draw(st.integers(0, len(words)))
    changed = [*words[:index], data.draw(st.sampled_from(WORDS)), *words[index + data.draw(st.integers(0, 1)) :]]
    entry = header[key] if data.draw(st.booleans()) else header.pop(key)
    assume(".".join(changed) not in header)
    header[".".join(changed)] = entry
    text = json.dumps(header).encode()
    file = source[2].with_name("changed.safetensors")
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    said = refusal(lambda: ranges(source, file))
    if said is None:
        assert ranges(source, file) == ranges(source, source[2])
    else:
        assert said.startswith(str(file))
        assert "\n" not in said
