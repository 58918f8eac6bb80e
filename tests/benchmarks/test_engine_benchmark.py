"""`benchmarks engine`: contenders beside each other, inputs that fit every part, and what is refused."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks import engine
from benchmarks.engine_worker import Case, arrays, open_call, visit
from kit.artifact import read_manifest
from kit.dtypes import number_format
from kit.errors import CheckFailed, UsageError


def arguments(*contenders: str, **options: Any) -> argparse.Namespace:
    defaults = {
        "contenders": list(contenders),
        "part": "transformer",
        "size": "64x64",
        "rows": 1,
        "rounds": 2,
        "seconds": 0.01,
        "threads": 1,
    }
    return argparse.Namespace(**(defaults | options))


@pytest.mark.parametrize("part", engine.PARTS)
def test_every_part_of_an_artifact_is_called_with_inputs_of_its_ports(part: Any, sample_artifact: Path) -> None:
    case = Case(part, 64, 48, 2, 1)
    manifest = read_manifest(sample_artifact)
    given = arrays(manifest.part(part).ports, manifest.variant, case)
    for port in manifest.part(part).ports.inputs:
        assert given[port.name].dtype.name == number_format(port.dtype).numpy
        assert len(given[port.name]) == 2
    seconds = visit(open_call(str(sample_artifact), "ort-cpu", case), 0)
    assert len(seconds) == 3
    assert min(seconds) > 0


def test_contenders_are_measured_beside_the_baseline(sample_artifact: Path) -> None:
    facts = engine.run(arguments(f"ort-cpu={sample_artifact}", "torch-fp32=sample", rows=2))
    assert set(facts["contenders"]) == {"ort-cpu sample", "torch-fp32 sample"}
    for row in facts["contenders"].values():
        assert len(row["call_seconds"]) >= 2 * 2 * 3
        assert 50e6 < row["peak_memory_bytes"] < 8e9
        assert 0 < row["share_of_ceiling"] < 1.5
        assert row["speedup_interval"][0] <= row["speedup"] <= row["speedup_interval"][1]
    assert facts["contenders"]["ort-cpu sample"]["speedup"] == 1
    assert "torch-fp32 sample" in engine.table(facts)


def test_a_contender_that_fails_is_named(sample_artifact: Path) -> None:
    with pytest.raises(CheckFailed, match=r"own sample: UsageError: .* is of kind onnx and is run by ort-cpu"):
        engine.Worker(engine.Contender("own", str(sample_artifact)), Case("transformer", 64, 64, 1, 1))


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["ort-cpu"], {}, "ort-cpu: write RUNTIME=SOURCE"),
        (["tpu=sample"], {}, "tpu=sample: unknown runtime 'tpu'; there are: ort-cpu, openvino-fp32"),
        (["torch-fp32=sample", "torch-fp32=sample"], {}, "torch-fp32 sample is named twice"),
        (["torch-fp32=sample"], {"size": "big"}, "--size big: write WIDTHxHEIGHT"),
        (["torch-fp32=sample"], {"size": "100x64"}, "--size 100x64: sides must be multiples of 16"),
        (["torch-fp32=sample"], {"rows": 0}, "--rows 0 is not positive"),
        (["torch-fp32=sample"], {"seconds": 0.0}, "--seconds 0 is not positive"),
    ],
)
def test_wrong_use_is_told_before_anything_is_measured(words: list[str], options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine.run(arguments(*words, **options))
