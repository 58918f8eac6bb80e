"""`benchmarks engine`: contenders beside each other, inputs that fit every part, and what is refused."""

from __future__ import annotations

import argparse
import json
import sys
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
        "optimum_python": None,
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
        engine.run(arguments(f"ort-cpu={sample_artifact}", f"own={sample_artifact}"))


OPTIMUM = """
from types import SimpleNamespace

print("a package that prints while it is loaded")
PORTS = {"hidden_states": 3, "encoder_hidden_states": 3, "timestep": 1, "img_ids": 2, "txt_ids": 2}


class Transformer:
    model = SimpleNamespace(inputs=[SimpleNamespace(any_name=n, partial_shape=[1] * r) for n, r in PORTS.items()])

    def __call__(self, **inputs):
        assert {name: value.ndim for name, value in inputs.items()} == PORTS
        assert inputs["hidden_states"].shape == (2, 16, 128), inputs["hidden_states"].shape
        assert inputs["encoder_hidden_states"].shape == (2, 48, 192)


class OVFlux2KleinPipeline:
    transformer = Transformer()

    @classmethod
    def from_pretrained(cls, folder, compile, ov_config):
        assert ov_config == {"INFERENCE_NUM_THREADS": "1"}
        return cls()
"""


def test_the_pipeline_of_optimum_is_a_contender_in_a_python_of_its_own(
    sample_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "packages" / "optimum"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "intel.py").write_text(OPTIMUM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    saved = tmp_path / "saved" / "transformer"
    saved.mkdir(parents=True)
    (saved / "openvino_model.xml").touch()
    (saved / "config.json").write_text(json.dumps({"in_channels": 128, "joint_attention_dim": 192}))
    words = (f"ort-cpu={sample_artifact}", f"optimum={saved.parent}")
    facts = engine.run(arguments(*words, rows=2, optimum_python=Path(sys.executable)))
    assert facts["contenders"]["optimum saved"]["median_seconds"] > 0
    assert facts["contenders"]["optimum saved"]["weight_bytes"] == facts["contenders"]["ort-cpu sample"]["weight_bytes"]
    with pytest.raises(UsageError, match="needs --optimum-python"):
        engine.run(arguments(*words))
    with pytest.raises(UsageError, match="runs the transformer alone, not the vae_decoder"):
        engine.run(arguments(*words, part="vae_decoder", optimum_python=Path(sys.executable)))


@pytest.mark.parametrize(
    ("words", "options", "message"),
    [
        (["ort-cpu"], {}, "ort-cpu: write RUNTIME=SOURCE"),
        (["tpu=sample"], {}, "tpu=sample: unknown runtime 'tpu'; there are: ort-cpu, openvino-fp32"),
        (["torch-fp32=sample", "torch-fp32=sample"], {}, "torch-fp32 sample is named twice"),
        (["optimum=saved", "torch-fp32=sample"], {}, "optimum=saved cannot be the baseline"),
        (["torch-fp32=sample", "optimum=saved"], {}, "saved is no folder that optimum-intel's pipeline saved"),
        (["torch-fp32=sample"], {"size": "big"}, "--size big: write WIDTHxHEIGHT"),
        (["torch-fp32=sample"], {"size": "100x64"}, "--size 100x64: sides must be multiples of 16"),
        (["torch-fp32=sample"], {"rows": 0}, "--rows 0 is not positive"),
        (["torch-fp32=sample"], {"seconds": 0.0}, "--seconds 0 is not positive"),
    ],
)
def test_wrong_use_is_told_before_anything_is_measured(words: list[str], options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine.run(arguments(*words, **options))
