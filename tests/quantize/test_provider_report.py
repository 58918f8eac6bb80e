"""`quantize report --provider`: the nodes of each part by the provider that runs them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from kit.errors import UsageError
from quantize.report_command import add_arguments, run
from tests.conftest import ByFamily


def report(folder: Path, provider: str) -> dict[str, object]:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args([str(folder), "--provider", provider]))


def test_the_session_tells_who_runs_the_nodes(artifact_of: ByFamily, capsys: pytest.CaptureFixture[str]) -> None:
    facts = report(artifact_of("klein"), "cpu")
    assert facts["provider"] == "CPUExecutionProvider"
    parts = facts["parts"]
    assert isinstance(parts, dict)
    assert set(parts) == {"text_encoder", "transformer", "vae_decoder"}
    assert set(parts["transformer"]["nodes"]) == {"CPUExecutionProvider"}
    assert parts["transformer"]["nodes"]["CPUExecutionProvider"] > 100
    assert any("(MatMul)" in word for word in parts["transformer"]["on_cpu"])
    assert "nodes on CPUExecutionProvider" in capsys.readouterr().out


def test_a_provider_that_is_not_here_is_named(artifact_of: ByFamily) -> None:
    with pytest.raises(UsageError, match="has no CUDAExecutionProvider: pip install onnxruntime-gpu"):
        report(artifact_of("klein"), "cuda")
