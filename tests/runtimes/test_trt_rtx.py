"""TensorRT for RTX at run time, against its real signatures: kernels that are kept, its CUDA graphs, rejections.

The library itself is asked where it answers without a GPU: what it says of a file that is no plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit.errors import ArtifactError
from tests.runtimes import rtx
from tests.runtimes.bindings import load
from tests.runtimes.bindings.real import RTX, interface
from tests.runtimes.bindings.runtime_world import DEVICE, CpuDevice, expected, inputs, record
from tests.runtimes.bindings.strict import StrictModule
from tests.runtimes.test_trt_engine import (
    open_engine,
    same,
    test_a_context_that_cannot_be_created_or_set_is_rejected,
    test_all_contexts_share_one_arena_of_the_largest_size,
    test_weights_that_are_inputs_are_bound_once_and_exchanged_in_place,
)

pytestmark = rtx.needs_rtx


@pytest.fixture
def trt() -> Iterator[StrictModule]:
    made = StrictModule(interface(RTX))
    with load.using(made):
        yield made


def kernels(root: Path) -> list[Path]:
    return sorted((root / "transformer").glob("small.*.kernels"))


def test_the_library_records_its_own_graphs_so_every_call_is_enqueued(trt: StrictModule, tmp_path: Path) -> None:
    engine, device = open_engine(trt, tmp_path)
    for seed in range(3):
        assert same(engine.run(inputs(2, 5, seed)), expected(inputs(2, 5, seed)))
    assert device.captures == 0
    configs = {context.rtx._config.cuda_graph_strategy.name for context in engine._contexts}
    assert configs == {"WHOLE_GRAPH_CAPTURE"}
    plain, _ = open_engine(trt, tmp_path, graphs=False)
    assert {context.rtx._config.cuda_graph_strategy.name for context in plain._contexts} == {"DISABLED"}


def test_compiled_kernels_are_kept_beside_the_plan_and_loaded_by_the_next_process(
    trt: StrictModule, tmp_path: Path
) -> None:
    engine, _ = open_engine(trt, tmp_path)
    assert not kernels(tmp_path)
    engine.run(inputs(1, 4))
    (file,) = kernels(tmp_path)
    assert file.read_bytes() == b"(1, 4, 2)"
    engine.run(inputs(1, 5))
    engine.run(inputs(1, 6))
    assert file.read_bytes() == b"(1, 4, 2);(1, 5, 2)", "the third call writes nothing"
    engine.run(inputs(1, 6))
    assert file.read_bytes().endswith(b"(1, 6, 2)")
    open_engine(trt, tmp_path)
    assert trt.called("IRuntimeCache", "deserialize") == [{"blob": file.read_bytes()}]
    assert trt.called("IRuntimeConfig", "set_runtime_cache")
    assert [path.name for path in file.parent.iterdir() if path.name.startswith(".")] == [], "no temporary file is left"


def test_kernels_are_written_again_only_when_there_are_others(trt: StrictModule, tmp_path: Path) -> None:
    engine, _ = open_engine(trt, tmp_path)
    engine.run(inputs(1, 4))
    (file,) = kernels(tmp_path)
    before = file.stat().st_mtime_ns, file.stat().st_ino
    for _ in range(4):
        engine.run(inputs(1, 4))
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == before


def test_another_gpu_driver_release_or_plan_has_another_file(trt: StrictModule, tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"a plan")
    name = load.module("runtimes.trt.rtx").cache_file
    found = {name(plan, DEVICE), name(plan, replace(DEVICE, driver="590.1")), name(plan, replace(DEVICE, title="L40S"))}
    trt.__version__ = "1.8.0.1"
    found.add(name(plan, DEVICE))
    plan.write_bytes(b"another plan")
    found.add(name(plan, DEVICE))
    assert len(found) == 5
    assert {path.parent for path in found} == {tmp_path}


def test_old_files_beside_a_plan_are_removed(trt: StrictModule, tmp_path: Path) -> None:
    engine, _ = open_engine(trt, tmp_path)
    for number in range(6):
        (tmp_path / "transformer" / f"small.{number}.kernels").write_bytes(b"old")
    (tmp_path / "transformer" / "large.0.kernels").write_bytes(b"of the other plan")
    engine.run(inputs(1, 4))
    assert len(kernels(tmp_path)) == load.module("runtimes.trt.rtx").KEPT
    assert (tmp_path / "transformer" / "large.0.kernels").is_file()


def test_a_cache_that_is_broken_too_large_or_cannot_be_written_does_not_stop_a_call(
    trt: StrictModule, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING)
    module = load.module("runtimes.trt.rtx")
    engine, _ = open_engine(trt, tmp_path)
    engine.run(inputs(1, 4))
    (file,) = kernels(tmp_path)
    file.write_bytes(b"broken")
    engine, _ = open_engine(trt, tmp_path)
    assert f"{file}: is not for this machine or is broken" in caplog.text
    monkeypatch.setattr(module, "MOST_BYTES", 3)
    assert same(engine.run(inputs(1, 4)), expected(inputs(1, 4)))
    assert "bytes of kernels are too many to keep" in caplog.text
    monkeypatch.undo()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    engine, _ = open_engine(trt, tmp_path)
    assert same(engine.run(inputs(1, 7)), expected(inputs(1, 7)))
    assert "kernels cannot be kept ([Errno 28] No space left on device)" in caplog.text
    assert [path for path in file.parent.iterdir() if path.name.startswith(".")] == []


def test_a_plan_that_the_library_says_is_invalid_is_rejected_with_its_reasons(trt: Any, tmp_path: Path) -> None:
    open_engine(trt, tmp_path)
    old, other = trt.EngineInvalidityDiagnostics.OLD_CUDA_DRIVER, trt.EngineInvalidityDiagnostics.UNSUPPORTED_CC
    trt.behave(
        "Runtime", "get_engine_validity", lambda runtime, buffer: (trt.EngineValidity.INVALID, int(old) | int(other))
    )
    plans = load.module("runtimes.trt.plans")
    device = CpuDevice()
    with pytest.raises(
        ArtifactError, match=r"small.plan: TensorRT for RTX cannot run the plan: UNSUPPORTED_CC, OLD_CUDA"
    ):
        plans.Plans(tmp_path, "transformer", record(RTX, tmp_path), device, plans.Arena(device))


def test_the_real_library_rejects_a_file_that_is_no_plan(tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"no plan" * 1000)
    done = rtx.run("tests.runtimes.bindings.ask_validity", str(tmp_path / "model.plan"))
    assert "model.plan: TensorRT for RTX cannot run the plan: MALFORMED_ENGINE" in done.stderr, done.stderr


# --- one misspelled name ---------------------------------------------------------------------------------------------


SCENARIOS: tuple[Callable[[StrictModule, Path], None], ...] = (
    test_the_library_records_its_own_graphs_so_every_call_is_enqueued,
    test_compiled_kernels_are_kept_beside_the_plan_and_loaded_by_the_next_process,
    test_a_plan_that_the_library_says_is_invalid_is_rejected_with_its_reasons,
    test_all_contexts_share_one_arena_of_the_largest_size,
    test_weights_that_are_inputs_are_bound_once_and_exchanged_in_place,
    test_a_context_that_cannot_be_created_or_set_is_rejected,
)


def walk(version: str, folder: Path, sources: Mapping[str, str] | None = None) -> None:
    """Go through the runtime of TensorRT for RTX once."""
    for number, scenario in enumerate(SCENARIOS):
        trt = StrictModule(interface(version))
        with load.using(trt, sources):
            if not number:
                load.resolve_annotations("runtimes.trt.rtx")
            place = folder / str(number)
            place.mkdir(parents=True)
            scenario(trt, place)


def test_every_single_misspelled_name_is_noticed(tmp_path: Path) -> None:
    load.check_misspellings("runtimes.trt.rtx", RTX, walk, tmp_path)
