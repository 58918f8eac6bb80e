"""Fixtures of the search's tests: the record of the sample and its model in torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.torch_part import TorchPart, bind
from kit.artifact import read_manifest
from kit.checkpoint import resolve
from kit.ports import PartName
from pipeline.prompts import PromptEncoder
from quantize.calibration import record
from quantize.search.sensitivity import Model


@pytest.fixture(scope="module")
def seen(sample_record: Path) -> record.Record:
    return record.read(sample_record)


@pytest.fixture(scope="module")
def model(sample_artifact: Path) -> Model:
    variant = read_manifest(sample_artifact).variant
    parts: tuple[PartName, ...] = ("text_encoder", "transformer")
    bindings = {part: bind(part, variant, resolve("sample")) for part in parts}
    prompts = PromptEncoder(sample_artifact / "tokenizer", variant.text_encoder.kind, variant.text_tokens)
    return Model(variant, bindings, prompts, "fp32")


@pytest.fixture(scope="module")
def transformer(model: Model) -> TorchPart:
    return model.load("transformer")
