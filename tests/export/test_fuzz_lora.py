"""Thousands of mutated adapter files: each is merged or refused, and no tensor that fits nothing is accepted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from export.lora.terms import Lora, read_terms
from kit import safetensors_file
from kit.configs import read_variant
from kit.variants import Variant
from tests.conftest import ByFamily
from tests.export.lora_files import ACCEPTED, Case
from tests.kit.test_fuzz import refusal, values

Shapes = dict[str, tuple[int, ...]]
quickly = settings(
    max_examples=2000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
WORDS = ("transformer", "blocks", "0", "attn", "qkv", "lora_A", "lora_B", "weight", "alpha", "diff", "linear1", "x", "")


@pytest.fixture(scope="module")
def model(checkpoint_of: ByFamily) -> tuple[Variant, Shapes]:
    checkpoint = checkpoint_of("klein")
    stored = safetensors_file.read_folder(checkpoint / "transformer")
    return read_variant(checkpoint), {name: tensor.shape for name, tensor in stored.items()}


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    return [make() for make in ACCEPTED.values()]


@quickly
@given(data=st.data())
def test_mutated_keys_and_headers_are_merged_or_refused(
    model: tuple[Variant, Shapes],
    cases: list[Case],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    case = data.draw(st.sampled_from(cases))
    tensors, metadata = dict(case.tensors), case.metadata
    match data.draw(st.integers(0, 3)):
        case 0:
            key = data.draw(st.sampled_from(sorted(tensors)))
            tensors[mutated(key, data)] = tensors.pop(key)
        case 1:
            key = data.draw(st.sampled_from(sorted(tensors)))
            rows = tensors[key].reshape(-1)
            tensors[key] = rows[: data.draw(st.integers(0, min(9, len(rows))))].clone()
        case 2:
            header = {
                data.draw(st.sampled_from(("transformer.", "", "unet."))) + name: data.draw(values)
                for name in (
                    data.draw(
                        st.sampled_from(("r", "lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "shiny"))
                    ),
                )
            }
            metadata = {
                "lora_adapter_metadata": json.dumps(header | {"lora_alpha": 4} if data.draw(st.booleans()) else header)
            }
        case _:
            word = data.draw(st.sampled_from(("lora_alpha", "network_alpha", "r", "ss_network_alpha", "use_dora")))
            metadata = {word: data.draw(st.text(max_size=5)), "lora_adapter_metadata": data.draw(st.text(max_size=9))}
    file = tmp_path_factory.getbasetemp() / "fuzzed" / "adapter.safetensors"
    file.parent.mkdir(exist_ok=True)
    save_file({k: t.contiguous() for k, t in tensors.items()}, file, metadata=metadata)
    variant, shapes = model
    said = refusal(lambda: read_terms([Lora(file)], variant, "transformer", shapes))
    if said is not None:
        assert "\n" not in said
        return
    terms = read_terms([Lora(file)], variant, "transformer", shapes)
    applied = {term.factors for found in terms.values() for term in found}
    for weight, found in terms.items():
        for term in found:
            assert term.factors.shape[1:] == shapes[weight][1:]
    used = {tensor.name for factors in applied for tensor in stored_in(factors)}
    assert {name for name in tensors if not name.endswith("alpha")} == used


def stored_in(factors: object) -> list[safetensors_file.StoredTensor]:
    """List the tensors of a product."""
    found: list[safetensors_file.StoredTensor] = []
    for value in vars(factors).values():
        found += value if isinstance(value, tuple) else [value]
    return found


def mutated(key: str, data: st.DataObject) -> str:
    """Change one word of a key, its separators, or characters."""
    words = key.split(".")
    index = data.draw(st.integers(0, len(words) - 1))
    match data.draw(st.integers(0, 3)):
        case 0:
            words[index] = data.draw(st.sampled_from(WORDS))
        case 1:
            words.insert(index, data.draw(st.sampled_from(WORDS)))
        case 2:
            del words[index]
        case _:
            words[index] = data.draw(st.text(max_size=4).filter(lambda text: text.isprintable()))
    return data.draw(st.sampled_from(".._")).join(words) or "x"


def test_the_plain_cases_use_every_tensor(model: tuple[Variant, Shapes], cases: list[Case], tmp_path: Path) -> None:
    """The check of the test above holds for files that are as they should be."""
    variant, shapes = model
    for index, case in enumerate(cases):
        file = case.write(tmp_path / str(index))
        terms = read_terms([Lora(file)], variant, "transformer", shapes)
        applied = {t.name for found in terms.values() for term in found for t in stored_in(term.factors)}
        assert {name for name in case.tensors if not name.endswith("alpha")} == applied
