"""A pytest plug-in for the developer's loop: `pytest -p tests.quick` leaves out what needs more than a moment.

That is: tests that start a server or need a GPU, tests behind a fixture that exports a whole checkpoint, and those
named below, which export, compile or draw in the test itself. `make test` runs them all.
"""

from __future__ import annotations

import pytest

HEAVY_FIXTURES = {"artifact_of", "sample_artifact", "deployment_of", "server", "sample_record", "quantized_of"}
HEAVY_MARKS = ("server", "gpu")
HEAVY_TESTS = (  # files, or tests of them
    "benchmarks/test_gpu.py",
    "benchmarks/test_plan_properties.py",
    "benchmarks/test_sample_checkpoint.py",
    "benchmarks/test_sample_continuing.py",
    "benchmarks/test_sample_training.py",
    "export/test_artifact.py",
    "export/test_command.py",
    "export/test_fusion.py",
    "export/test_graph_quality.py",
    "export/test_kv_cache.py",
    "export/test_lint.py::test_the_command_names",
    "export/test_lora_export.py",
    "export/test_optimum_command.py",
    "export/test_parity_parts.py",
    "export/test_sample_loras_export.py",
    "export/test_single_file.py::TestTransformer",
    "export/test_small_decoder.py",
    "export/test_sources.py::TestSingleFiles",
    "export/test_unfinished.py",
    "export/test_fuzz_checkpoint.py",
    "export/test_fuzz_lora.py",
    "kit/test_fuzz.py",
    "kit/test_sample_world.py::test_the_judge_",
    "kit/test_tiny.py::test_the_prompt_moves_the_velocity",
    "quantize/test_conversions.py::test_a_part_of_one_and_a_half",
    "quantize/test_sources.py",
    "runtimes/test_aoti.py",
    "serve/test_aoti_deploy.py",
    "runtimes/test_trt_compile_all.py::test_what",
    "runtimes/test_trt_weight_inputs.py",
    "runtimes/test_trt_build_quantized.py",
    "serve/test_command.py::test_a_bf16_artifact_is_refused",
    "serve/test_command.py::test_an_artifact_without_a_part",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the heavy ones."""
    heavy = [item for item in items if is_heavy(item)]
    config.hook.pytest_deselected(items=heavy)
    items[:] = [item for item in items if item not in heavy]


def is_heavy(item: pytest.Item) -> bool:
    """Say whether a test is left out."""
    return (
        any(item.get_closest_marker(mark) for mark in HEAVY_MARKS)
        or not HEAVY_FIXTURES.isdisjoint(getattr(item, "fixturenames", ()))
        or item.nodeid.removeprefix("tests/").startswith(HEAVY_TESTS)
    )
