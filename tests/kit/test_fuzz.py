"""Thousands of mutations of configs and headers: each is read or refused with a sentence, none ends in a traceback."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kit.configs import read_variant
from kit.errors import UsageError
from kit.safetensors_file import read_folder, read_header, read_metadata
from tests.conftest import ByFamily

EXAMPLES = 2000
quickly = settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
CONFIGS = (
    "model_index.json",
    "transformer/config.json",
    "text_encoder/config.json",
    "vae/config.json",
    "scheduler/scheduler_config.json",
    "tokenizer/tokenizer_config.json",
    "flux2_deploy.json",
)
numbers = st.one_of(
    st.integers(-3, 600), st.sampled_from([0, 2**31, 2**63, 10**400, 1e308, 0.5, -1.5, float("nan"), float("inf")])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(max_size=6)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def configs(checkpoint_of: ByFamily, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copy the configs of two families without weights."""
    made = {}
    for family in ("klein", "dev"):
        folder = tmp_path_factory.mktemp("fuzz") / family
        for name in CONFIGS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(checkpoint_of("dev" if family == "dev" else "klein") / name, folder / name)
        made[family] = folder
    return made


@quickly
@given(data=st.data())
def test_a_mutated_config_is_read_or_refused(configs: dict[str, Path], data: st.DataObject) -> None:
    folder = configs[data.draw(st.sampled_from(sorted(configs)))]
    path = folder / data.draw(st.sampled_from(CONFIGS))
    before = path.read_bytes()
    try:
        path.write_bytes(mutated(before, data))
        said = refusal(lambda: read_variant(folder))
    finally:
        path.write_bytes(before)
    assert said is None or (str(folder) in said and "\n" not in said)


def refusal(call: Callable[[], object]) -> str | None:
    """Return the message with which a call refuses its input, None if it accepts it."""
    try:
        call()
    except UsageError as error:
        return str(error)
    return None


def mutated(raw: bytes, data: st.DataObject) -> bytes:
    """Change one value at any depth, or the bytes."""
    if data.draw(st.integers(0, 9)) == 0:
        cut = data.draw(st.integers(0, len(raw)))
        return raw[:cut] + data.draw(st.binary(max_size=8)) + raw[cut + data.draw(st.integers(0, 3)) :]
    loaded: Any = json.loads(raw)
    target = loaded
    while True:
        key = data.draw(st.sampled_from(sorted(target)))
        if isinstance(target[key], dict) and target[key] and data.draw(st.booleans()):
            target = target[key]
            continue
        break
    if data.draw(st.integers(0, 7)) == 0:
        del target[key]
    else:
        target[key] = data.draw(values)
    return json.dumps(loaded).encode()


HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


@quickly
@given(data=st.data())
def test_a_mutated_safetensors_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    raw = mutated(json.dumps(HEADER).encode(), data)
    length = data.draw(st.sampled_from([len(raw)] * 8 + [0, 7, len(raw) + 1, 2**40]))
    path.write_bytes(struct.pack("<Q", length) + raw + bytes(32))
    said = refusal(lambda: (read_header(path), read_metadata(path)))
    assert said is None or said.startswith(str(path))
    for tensor in read_header(path).values() if said is None else ():
        assert tensor.offset >= 8
        assert tensor.offset + tensor.nbytes <= path.stat().st_size


@settings(quickly, max_examples=300)
@given(raw=st.one_of(st.binary(max_size=40), values.map(lambda v: json.dumps(v).encode())))
def test_a_mutated_shard_index_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "shards"
    folder.mkdir(exist_ok=True)
    for text in (raw, b'{"weight_map": ' + raw + b"}"):
        (folder / "model.safetensors.index.json").write_bytes(text)
        said = refusal(lambda: read_folder(folder))
        assert said is None or str(folder) in said
