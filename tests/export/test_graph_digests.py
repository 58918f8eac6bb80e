"""The graphs made from the sample have not changed.

To check all forms, including bf16 and the Attention operator, run `python -m tests.export.graph_digests`.
"""

from __future__ import annotations

from pathlib import Path

from tests.export.graph_digests import differences, exported, quantized


def test_the_exported_graphs_of_the_sample_are_the_expected_ones(sample_artifact: Path) -> None:
    assert differences(exported(sample_artifact, "fp32-matmul")) == []


def test_the_quantized_graphs_of_the_sample_are_the_expected_ones(sample_artifact: Path, tmp_path: Path) -> None:
    assert differences(quantized(sample_artifact, "fp32", ("fp8", "int8", "int4-weights"), tmp_path)) == []
