"""The trials of int8 products measure what they say they do."""

from __future__ import annotations

from benchmarks import cpu_trials


def test_products_behind_a_shared_quantize_are_not_fused_by_onnx_runtime() -> None:
    # a failure means that ONNX Runtime has learned it: see docs/decisions.md, products that read the same activation
    assert cpu_trials.shared_quantize() == {"shared": 0, "own": 2}


def test_a_slice_per_panel_takes_more_memory_than_one_split() -> None:
    split, sliced = (cpu_trials.piece(name)["peak_mb"] for name in ("split", "slice"))
    weight = 4 * cpu_trials.DEPTH * cpu_trials.COLUMNS / 1e6
    assert sliced - split > 0.8 * weight
