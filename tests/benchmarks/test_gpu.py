"""The GPU benchmark on a CPU at tiny sizes: every kind of case, including cases that fail, hang or die."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.gpu import batching, dev, images, modes, results, runner, worker
from benchmarks.gpu.cases import KERNELS, PART_MODES, Case, RunSettings, cases, chosen, shrink, variant_of
from benchmarks.gpu.clock import Unavailable, clock, percentile
from benchmarks.gpu.points import points
from benchmarks.gpu.table import render
from benchmarks.gpu.weights import random_part
from kit.errors import UsageError
from kit.variants import VARIANTS
from planner.measurements import Measurement

DRY = RunSettings(device="cpu", size="tiny", launch="calls", backend="eager", seconds=0.01, requests=4)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Tiny tensors gain nothing from threads, which wait for each other on a busy machine."""
    before, grad = torch.get_num_threads(), torch.is_grad_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    torch.set_grad_enabled(grad)


def measured(tmp_path: Path, *wanted: Case, settings: RunSettings = DRY) -> list[dict[str, Any]]:
    """Let the worker measure cases of one group in this process."""
    job, rows = tmp_path / "job.json", tmp_path / "rows.jsonl"
    plain = {"settings": asdict(settings), "cases": [asdict(c) for c in wanted], "deadline": time.time() + 300}
    job.write_text(json.dumps(plain))
    rows.unlink(missing_ok=True)
    assert worker.main([str(job), str(rows)]) == 0
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert lines[0]["device"]["name"] == "CPU"
    assert [line["begin"] for line in lines if "begin" in line] == [case.id for case in wanted]
    return [line["row"] for line in lines if "row" in line]


ERRORS = {"bf16": 0.05, "fp8": 0.15, "int8": 0.1, "int8-weights": 0.06}


@pytest.mark.parametrize("mode", ["diffusers", "eager", "compile", "fp8", "int8", "int8-weights"])
def test_a_transformer_step_is_timed_and_compared_with_fp32(mode: str, tmp_path: Path) -> None:
    alone, pair = measured(tmp_path, Case("part", "transformer", mode, 64, 1), Case("part", "transformer", mode, 48, 2))
    assert (alone["state"], pair["state"]) == ("measured", "measured")
    assert 0 < alone["median"] <= alone["p95"]
    assert 1e-5 < alone["error"] < ERRORS[alone["recipe"]]
    assert alone["flops"] > 0
    assert "error" not in pair  # a batch is timed; its rows are those of one image


@pytest.mark.parametrize(("part", "bound"), [("text_encoder", 0.05), ("vae_decoder", 0.1)])
@pytest.mark.parametrize("mode", ["diffusers", "compile"])
def test_the_other_parts_agree_with_fp32_in_both_stacks(part: str, bound: float, mode: str, tmp_path: Path) -> None:
    (row,) = measured(tmp_path, Case("part", part, mode, 64))
    assert row["state"] == "measured", row
    assert row["error"] < bound


@pytest.mark.parametrize("mode", ["diffusers", "compile", "fp8"])
def test_whole_images_are_generated_from_prompts(mode: str, tmp_path: Path) -> None:
    (row,) = measured(tmp_path, Case("image", "whole", mode, 64))
    assert row["state"] == "measured", row
    assert row["images_per_minute"] == pytest.approx(60 / row["median"])
    assert row["steps"] == 4


def test_our_whole_image_has_the_bytes_of_every_image_of_the_batch() -> None:
    torch.set_grad_enabled(False)
    ours = images.Ours(variant_of(DRY), DRY, "eager")
    found = ours.generate(Case("image", "whole", "eager", 48, 2))
    assert (found.shape, found.dtype) == ((2, 48, 48, 3), torch.uint8)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("fusion", ["plain", "prepared", "both"])
def test_fusions_are_timed(fusion: str, tmp_path: Path) -> None:
    (row,) = measured(tmp_path, Case("fusion", "transformer", fusion, 64))
    assert row["state"] == "measured", row
    if fusion != "both":
        assert row["error"] < ERRORS["bf16"]


def test_ceilings_and_attention_kernels_are_timed(tmp_path: Path) -> None:
    for subject in ("bf16", "fp8", "int8"):
        (row,) = measured(tmp_path, Case("ceiling", subject, "matmul"))
        assert row["flops"] == 2 * row["side_of_matrices"] ** 3
    (row,) = measured(tmp_path, Case("ceiling", "copy", "memory"))
    assert row["bytes_moved"] == 2 << 20
    rows = [measured(tmp_path, Case("attention", "head128", kernel, 64))[0] for kernel in KERNELS if kernel != "flex"]
    states = {row["id"].split("/")[2]: row["state"] for row in rows}
    assert (states["default"], states["math"], states["fp8"]) == ("measured", "measured", "unavailable")


def test_dev_is_projected_from_its_blocks(tmp_path: Path) -> None:
    (row,) = measured(tmp_path, Case("dev", "blocks", "fp8", 64))
    assert row["state"] == "measured", row
    sizes = VARIANTS["dev"].transformer
    medians = {(1, 1): 10.0, (3, 1): 16.0, (1, 5): 30.0}
    projected = dev.projection(VARIANTS["dev"], medians)
    assert projected["double_block_seconds"] == 3.0
    assert projected["single_block_seconds"] == 5.0
    assert projected["projected_step_seconds"] == 10 + 3 * (sizes.double_blocks - 1) + 5 * (sizes.single_blocks - 1)


def test_a_dev_that_the_card_does_not_hold_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (40 * 10**9, 80 * 10**9))
    with pytest.raises(Unavailable, match=r"the weights and a step take 69\.6 GB; 40\.0 GB are free"):
        dev.refuse_if_too_large(VARIANTS["dev"], "bf16", "cuda")


@pytest.mark.parametrize(("policy", "fullest"), [("step-level", (2, 3, 4)), ("one-by-one", (1,))])
def test_mixed_step_counts_share_calls_only_step_by_step(policy: str, fullest: tuple[int, ...], tmp_path: Path) -> None:
    (row,) = measured(tmp_path, Case("batching", "mixed-steps", policy, 48, 4))
    assert row["state"] == "measured", row
    assert row["runs"] == DRY.requests
    assert row["fullest_call"] in ((1, *fullest) if policy == "step-level" else fullest)
    assert row["rows_per_call"] >= 1


def test_arrivals_are_the_same_for_every_policy_and_keep_their_rate() -> None:
    drawn = batching.arrivals(2000, 0.5)
    assert drawn == batching.arrivals(2000, 0.5)
    assert drawn[-1][0] / 2000 == pytest.approx(0.5, rel=0.1)
    assert {steps for _, steps in drawn} == {4, 8, 20}


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("graphs", "CUDA graphs need a CUDA GPU"),
        ("fp8-torchao", "torchao is not installed; it can be installed from a wheel"),
    ],
)
def test_a_mode_that_cannot_run_here_becomes_a_row_with_its_reason(
    mode: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    (row,) = measured(tmp_path, Case("part", "transformer", mode, 64))
    assert row["state"] == "unavailable"
    assert reason in row["reason"]


def test_out_of_memory_and_failures_become_rows() -> None:
    lost = worker.failure(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5 GiB"))
    assert lost["state"] == "out of memory"
    broken = worker.failure(ValueError("first line\nsecond line"))
    assert broken == {"state": "failed", "reason": "ValueError: first line second line"}


def test_all_blocks_of_a_kind_are_compiled_once() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    torch.set_grad_enabled(False)
    counter = CompileCounter()
    variant = shrink(VARIANTS["klein-4b"])
    module = random_part("transformer", variant, "bf16", "cpu")
    modes.compile_blocks(module, counter)  # type: ignore[arg-type]  # a backend may be a function
    from benchmarks.gpu.weights import inputs

    module(**inputs("transformer", variant, 64, 1, "bf16", "cpu"))
    assert variant.transformer.single_blocks == 2
    assert counter.frame_count == 2  # one double, one single
    torch._dynamo.reset()


def test_the_clock_counts_runs_and_orders_them() -> None:
    timed = clock(lambda: time.sleep(0.001), "cpu", 0.02)
    assert 5 <= timed["runs"] <= 20
    assert 0.001 <= timed["median"] <= timed["p95"]
    assert percentile([3.0, 1.0, 2.0, 4.0], 0.95) == 4.0
    assert percentile([float(n) for n in range(1, 101)], 0.95) == 95.0


# A substitute for the worker: the name of a case decides what happens to it.
STAND_IN = """
import json, os, sys, time
job = json.load(open(sys.argv[1]))
rows = open(sys.argv[2], "a")
def say(line):
    rows.write(json.dumps(line) + "\\n"); rows.flush()
say({"device": {"name": "stand-in"}})
for case in job["cases"]:
    name = f"{case['what']}/{case['subject']}/{case['mode']}/{case['side']}x{case['side']}/b{case['batch']}"
    say({"begin": name})
    if case["batch"] == 2:
        print("the GPU fell off the bus", file=sys.stderr, flush=True)
        os.kill(os.getpid(), 11)
    if case["batch"] == 3:
        time.sleep(60)
    say({"row": {"id": name, "state": "measured", "median": 1.0, "p95": 1.0, "flops": 0.0}})
"""


def test_a_case_that_kills_its_process_is_a_row_and_the_others_go_on() -> None:
    wanted = [Case("part", "transformer", "eager", 64, batch) for batch in (1, 2, 4)]
    told: list[str] = []
    found = runner.measure(
        wanted,
        DRY,
        time.time() + 60,
        30.0,
        lambda _, row: told.append(row["id"]),
        worker=[sys.executable, "-c", STAND_IN],
    )
    assert told == [case.id for case in wanted]
    assert found.device == {"name": "stand-in"}
    one, two, four = found.rows
    assert (one["state"], four["state"]) == ("measured", "measured")
    assert two["state"] == "failed"
    assert two["reason"] == "its process ended with signal 11: the GPU fell off the bus"


def test_a_case_that_hangs_is_ended_and_one_that_the_budget_cuts_off_has_no_row() -> None:
    wanted = [Case("part", "transformer", "eager", 64, batch) for batch in (3, 1)]
    stand_in = [sys.executable, "-c", STAND_IN]
    found = runner.measure(wanted, DRY, time.time() + 60, 1.0, lambda *_: None, worker=stand_in)
    assert [row["state"] for row in found.rows] == ["failed", "measured"]
    assert found.rows[0]["reason"] == "took more than 1 s"
    cut = runner.measure(wanted, DRY, time.time() + 1.0, 30.0, lambda *_: None, worker=stand_in)
    assert cut.rows == []


def test_a_run_goes_on_where_the_last_one_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    into = tmp_path / "dry.json"
    options = ["gpu", "--device", "cpu", "--size", "tiny", "--seconds", "0.01", "--into", str(into)]
    assert main([*options, "--only", "ceiling/bf16/*", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["id"] for row in facts["rows"]] == ["ceiling/bf16/matmul"]
    assert facts["rows"][0]["share"]["bf16"] == pytest.approx(1.0)
    assert facts["planner"] == {"sources": {}, "points": [], "errors": []}  # a CPU adds no planner points
    written = into.read_text()
    assert main([*options, "--only", "ceiling/bf16/*"]) == 0  # nothing is left to do
    assert into.read_text() == written
    assert "ceiling/bf16/matmul" in capsys.readouterr().out
    assert main([*options, "--only", "ceiling/bf16/*", "--again", "--seconds", "0.02"]) == 2
    assert "the results so far have settings seconds=0.01; this run has seconds=0.02" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "part/tansformer/*"], "--only part/tansformer/*: no case matches; examples of ids: ceiling"),
        (["--budget", "0"], "--budget 0: must be positive"),
        (["--variant", "klein-5b"], "--variant klein-5b: whole images need a step-distilled variant: klein-4b"),
    ],
)
def test_wrong_use_is_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_machine_without_a_gpu_is_told_of_the_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    job, rows = tmp_path / "job.json", tmp_path / "rows"
    job.write_text(json.dumps({"settings": asdict(RunSettings()), "cases": [], "deadline": 0}))
    assert worker.main([str(job), str(rows)]) == 1
    assert "finds no CUDA GPU here; a dry run: --device cpu --size tiny" in json.loads(rows.read_text())["fatal"]


def test_another_files_json_is_not_taken_for_results(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text('{"benchmark": "export"}')
    with pytest.raises(UsageError, match=r"other\.json holds no results of this benchmark; choose another file"):
        results.read(path)


def test_results_of_two_cards_are_not_mixed() -> None:
    facts: dict[str, Any] = {"benchmark": "gpu", "rows": []}
    row = {"id": "a/b/c", "state": "measured"}
    results.merge(facts, {"name": "H100"}, {"size": "true"}, [row], "2026-01-01")
    results.merge(facts, {"name": "H100"}, {"size": "true"}, [row | {"state": "failed"}], "2026-01-02")
    assert facts["rows"] == [{"id": "a/b/c", "state": "failed", "date": "2026-01-02"}]
    assert results.finished(facts) == set()
    with pytest.raises(UsageError, match="have device name=H100; this run has name=H200: choose another file"):
        results.merge(facts, {"name": "H200"}, {"size": "true"}, [row], "2026-01-03")


def test_cases_are_listed_most_telling_first_and_once() -> None:
    short, full = cases("true", "short"), cases("true", "full")
    assert len({case.id for case in full}) == len(full)
    assert {case.id for case in short} <= {case.id for case in full}
    assert [case.what for case in short[:4]] == ["ceiling"] * 4
    step = [case for case in full if case.subject == "transformer" and case.what == "part"]
    assert {(case.mode, case.side, case.batch) for case in step} == {
        (mode, side, batch) for mode in PART_MODES for side in (512, 1024, 2048) for batch in (1, 2, 4, 8)
    }
    assert [case.id for case in chosen(short, "dev/whole/*")] == [
        "dev/whole/bf16/1024x1024/b1",
        "dev/whole/fp8/1024x1024/b1",
    ]


def h100(*rows: dict[str, Any]) -> dict[str, Any]:
    device = {"name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_520_809_984, "torch": "2.11.0+cu130", "cuda": "13.0"}
    facts: dict[str, Any] = {"benchmark": "gpu", "rows": []}
    results.merge(facts, device, asdict(RunSettings()), [{"state": "measured", **row} for row in rows], "2026-12-01")
    return facts


def test_measured_rows_become_points_of_the_planner() -> None:
    row = {"id": "part/transformer/fp8/1024x1024/b1", "recipe": "fp8", "median": 0.05, "p95": 0.06, "flops": 3.5e13}
    facts = h100(
        row,
        row | {"id": "part/transformer/aoti-fp8/1024x1024/b1", "median": 0.048},
        row | {"id": "part/transformer/fp8/512x512/b8"},  # the planner's points are single images
        row | {"id": "part/text_encoder/graphs/1024x1024/b1", "recipe": "bf16"},
        row | {"id": "image/whole/diffusers/1024x1024/b1", "recipe": "bf16", "median": 0.57, "steps": 4},
        row | {"id": "part/transformer/eager/1024x1024/b1", "recipe": "bf16", "state": "failed", "reason": "x"},
    )
    made = points(facts)
    step, image = (Measurement(**point) for point in made["points"])
    assert (step.gpu, step.stack, step.recipe, step.scope, step.seconds) == ("h100", "fused", "fp8", "step", 0.048)
    assert (image.stack, image.scope, image.steps, image.seconds) == ("eager", "image", 4, 0.57)
    assert made["sources"]["flux2-deploy"]["date"] == "2026-12-01"
    assert "torch 2.11.0+cu130, CUDA 13.0" in made["sources"]["flux2-deploy"]["note"]
    assert [error["id"] for error in made["errors"]] == [step.id, image.id]
    assert all(0.2 < error["predicted_over_measured"] < 5 for error in made["errors"])


def test_the_table_shows_shares_of_the_ceilings_and_what_did_not_run() -> None:
    facts = h100(
        {"id": "ceiling/bf16/matmul", "median": 0.001, "p95": 0.001, "flops": 8e11},
        {"id": "ceiling/fp8/matmul", "median": 0.001, "p95": 0.001, "flops": 16e11},
        {"id": "part/transformer/fp8/1024x1024/b1", "median": 0.05, "p95": 0.06, "flops": 3.2e13, "peak_bytes": 9e9},
        {"id": "part/transformer/int8/1024x1024/b1", "state": "out of memory", "reason": "CUDA out of memory"},
    )
    results.add_shares(facts)
    text = render(facts | {"left": ["dev/whole/bf16/1024x1024/b1"]})
    (line,) = (line for line in text.splitlines() if line.startswith("part/transformer/fp8"))
    assert line.split()[1:] == ["50.00ms", "60.00ms", "640", "80.0%", "40.0%", "9.00"]
    assert "out of memory: CUDA out of memory" in text
    assert "1 cases remain, starting with dev/whole/bf16/1024x1024/b1;" in text


def test_the_command_needs_no_package_that_a_gpu_machine_lacks() -> None:
    """Only torch, transformers, numpy and what they bring; diffusers may be absent, and its modes say so."""
    import subprocess

    code = """
import sys
for name in ("diffusers", "onnxruntime", "onnxscript", "onnx_ir", "onnx", "tritonclient", "torchao", "peft", "optimum"):
    sys.modules[name] = None
from benchmarks.__main__ import main
sys.exit(main(["gpu", "--list"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "part/transformer/fp8/1024x1024/b1" in done.stdout
