"""The real compiler builds plans for GPUs that are not here, and its table of layers proves what runs in 8 bits."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import pytest

from kit.artifact import read_manifest, write_manifest
from kit.compilers import COMPILERS, choose
from kit.errors import UsageError
from kit.gpus import gpu
from tests.conftest import Once
from tests.runtimes.rtx import VERSION, needs_rtx, run, start


@pytest.fixture(scope="module")
def bf16_of(once: Once, sample_record: Path) -> Callable[[str], Path]:
    """Export the sample's transformer for a GPU, and quantize it by a recipe."""

    @cache
    def make(recipe: str) -> Path:
        from benchmarks.compile import ALL_RECIPES
        from export.artifact import ExportConfig, export
        from kit.checkpoint import resolve
        from quantize.apply.apply import apply
        from quantize.calibration import record

        config = ExportConfig(("transformer",), dtype="bf16")
        plain = once("bf16/plain", lambda out: export(resolve("sample"), out, config))
        seen = record.read(sample_record)
        return once(f"bf16/{recipe}", lambda out: apply(plain, out, ALL_RECIPES[recipe], seen))

    return make


@needs_rtx
@pytest.mark.parametrize(
    ("recipe", "card", "outputs", "count"),
    [
        ("fp8", "l4", {"fp8>bf16"}, 24),
        ("int8", "a10g", {"int8>bf16"}, 24),
        ("fp8-attention", "rtx4090", {"fp8>bf16", "fp8>fp8"}, 60),  # 48, and two of each of six attentions
    ],
)
def test_every_quantized_product_of_the_sample_compiles_to_eight_bits(
    bf16_of: Callable[[str], Path], tmp_path: Path, recipe: str, card: str, outputs: set[str], count: int
) -> None:
    out = tmp_path / "engine"
    words = ["--gpu", card, "--sides", "128", "--max-batch", "2", "--json"]
    done = run("export", "engine", str(bf16_of(recipe)), "--out", str(out), *words)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["compiler"] == "tensorrt-rtx"
    (plan,) = facts["plans"]["transformer"]
    told = plan["layers"]
    assert told["quantized"] == {"asked": count, "run": count, "share": 1.0}
    assert told["missed"] == []
    assert told["attention"]["asked"] == told["attention"]["fused"] == 6
    narrow = {kind for kind in told["product_outputs"] if kind.startswith(recipe.partition("-")[0])}
    assert narrow
    assert all(any(kind.startswith(output) for output in outputs) for kind in narrow)
    assert told["moves"] == 0
    assert told["roofline"]["gpu"] == card
    assert 0 < told["roofline"]["blocks"]["transformer_blocks"]["seconds"] < told["roofline"]["seconds"]
    assert told["sizes"] == {"batch": 1, "image_tokens": 64}
    shown = run("export", "layers", str(out / "transformer" / "model.plan"), "--json")
    assert shown.returncode == 0, shown.stderr
    assert "single_transformer_blocks.3" in shown.stdout
    again = run("export", "engine", str(bf16_of(recipe)), "--out", str(out), *words)
    assert "up to date" in again.stdout


@needs_rtx
def test_attention_whose_fusion_a_graph_breaks_is_named(bf16_of: Callable[[str], Path], tmp_path: Path) -> None:
    """Q and DQ on queries, keys and values without the probabilities: TensorRT then writes the scores to memory."""
    broken = tmp_path / "broken"
    shutil.copytree(bf16_of("fp8-attention"), broken)
    path = broken / "transformer" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    inputs = {node.output[0]: node.input[0] for node in model.graph.node if ".probability/" in node.name}
    assert len(inputs) == 2 * 6
    for node in model.graph.node:
        if ".probability/" not in node.name:
            for place, name in enumerate(node.input):
                while name in inputs:
                    name = node.input[place] = inputs[name]
    path.write_bytes(model.SerializeToString())
    write_manifest(broken, read_manifest(broken))
    words = ["--gpu", "l4", "--sides", "128", "--max-batch", "1", "--json"]
    done = run("export", "engine", str(broken), "--out", str(tmp_path / "engine"), *words)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])["plans"]["transformer"][0]["layers"]
    assert told["attention"]["fused"] < told["attention"]["asked"] == 6
    assert len(told["attention"]["unfused"]) == 6 - told["attention"]["fused"]
    assert "warning: attention that is not one kernel, so its scores go through memory: " in done.stderr


@needs_rtx
def test_fp8_for_a_gpu_without_fp8_is_refused_before_anything_is_compiled(
    bf16_of: Callable[[str], Path], tmp_path: Path
) -> None:
    done = run("export", "engine", str(bf16_of("fp8")), "--gpu", "a10g", "--out", str(tmp_path / "engine"))
    assert done.returncode == 2
    assert "fp8 needs compute capability 8.9 or newer" in done.stderr
    assert not (tmp_path / "engine").exists()


@needs_rtx
@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("SIGINT", 130, "error: interrupted; unfinished output was removed"),
        (
            "SIGFPE",
            1,
            f"error: transformer/model.plan: TensorRT for RTX {VERSION} crashed (SIGFPE) while it built the ",
        ),
        ("SIGKILL", 1, f"error: transformer/model.plan: TensorRT for RTX {VERSION} was killed (SIGKILL) while it "),
    ],
)
def test_a_build_that_ends_early_says_why_and_leaves_nothing(
    bf16_of: Callable[[str], Path], tmp_path: Path, end: str, code: int, words: str
) -> None:
    command = ["export", "engine", str(bf16_of("fp8")), "--gpu", "l4", "--out", str(tmp_path / "made" / "engine")]
    build = start(*command)
    assert build.stderr is not None
    assert build.stderr.readline() == "building transformer/model.plan\n"
    (child,) = Path(f"/proc/{build.pid}/task/{build.pid}/children").read_text().split()
    os.kill(build.pid if end == "SIGINT" else int(child), signal.Signals[end])
    _, said = build.communicate(timeout=60)
    assert build.returncode == code
    assert words in said
    assert "Traceback" not in said
    assert list((tmp_path / "made").iterdir()) == []
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize("card", ["l4", "a10g", "a100-40g", "l40s", "rtx4090"])
def test_without_its_gpu_a_plan_is_built_ahead_of_time(card: str) -> None:
    assert choose("auto", gpu(card), here=None) is COMPILERS["tensorrt-rtx"]
    assert choose("auto", gpu(card), here=card) is COMPILERS["tensorrt"]


def test_hopper_needs_tensorrt_on_the_gpu_itself() -> None:
    assert choose("auto", gpu("h100"), here=None) is COMPILERS["tensorrt"]
    with pytest.raises(UsageError, match=r"--compiler tensorrt-rtx builds for compute capability 8.0, 8.6, 8.9, 12.0"):
        choose("tensorrt-rtx", gpu("h100"), here=None)
    with pytest.raises(UsageError, match="unknown compiler 'nvcc'; there are: auto, tensorrt, tensorrt-rtx"):
        choose("nvcc", gpu("l4"), here=None)
