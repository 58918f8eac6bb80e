"""The measuring tools of the benchmarks, on small examples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks import export_cost, export_parity, machine, plan_validation, residency, sparse
from benchmarks.__main__ import command_line
from benchmarks.__main__ import main as benchmarks
from benchmarks.measure import measure
from kit.configs import read_variant
from kit.errors import UsageError
from kit.safetensors_file import read_folder, read_header
from kit.variants import VARIANTS


def test_a_sparse_file_has_true_shapes_and_takes_no_disk(tmp_path: Path) -> None:
    path = sparse.write_sparse({"a": (1024, 1024, 16), "b": (3,)}, tmp_path / "model.safetensors")
    stored = read_header(path)
    assert {name: tensor.shape for name, tensor in stored.items()} == {"a": (1024, 1024, 16), "b": (3,)}
    assert path.stat().st_size > 33_000_000
    assert path.stat().st_blocks * 512 < 100_000


def test_shards_are_cut_where_the_limit_is_and_have_an_index(tmp_path: Path) -> None:
    shapes: sparse.Shapes = dict.fromkeys("abcde", (10,))
    paths = sparse.write_shards(shapes, tmp_path, "model", shard_bytes=40)
    assert [path.name for path in paths] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert set(read_folder(tmp_path)) == set(shapes)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_sparse_checkpoint_is_read_as_its_variant(name: str, tmp_path: Path) -> None:
    folder = sparse.write(VARIANTS[name], tmp_path / name)
    assert read_variant(folder) == VARIANTS[name]
    parameters = sum(t.nbytes // 2 for t in read_folder(folder / "transformer").values())
    published = {"dev": 32_223_281_152, "klein-4b": 3_875_544_576, "klein-9b": 9_078_581_248}
    assert parameters == published.get(name, parameters)
    used = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
    assert used < 5_000_000


def test_residency_sees_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(1 << 20))
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
    residency.drop(path)
    before = residency.resident_bytes(path)
    path.read_bytes()
    assert residency.resident_bytes(path) == 1 << 20
    assert before < 1 << 20


def test_new_bytes_are_those_that_are_no_links(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"0" * 1000)
    out = tmp_path / "out"
    out.mkdir()
    os.link(tmp_path / "weights", out / "linked")
    (out / "graph").write_bytes(b"0" * 30)
    os.link(out / "graph", out / "again")
    assert export_cost._new_bytes(out) == 30


def test_the_peak_of_a_small_command_is_its_own_and_not_that_of_who_started_it() -> None:
    held = bytearray(os.urandom(1 << 20) * 300)  # 300 MB, touched
    run = measure([sys.executable, "-c", "print('done')"])
    assert run.stdout == "done\n"
    assert run.peak_rss_bytes < 60_000_000 < len(held)
    assert 0 < run.cpu_seconds < 10
    larger = measure([sys.executable, "-c", "held = b'x' * 200_000_000"])
    assert larger.peak_rss_bytes > 200_000_000


def test_a_command_that_fails_is_told() -> None:
    with pytest.raises(subprocess.CalledProcessError, match="returned non-zero exit status 3"):
        measure([sys.executable, "-c", "import sys; sys.exit(3)"])


def test_the_command_of_a_result_does_not_tell_where_it_was_saved() -> None:
    argv = ["export", "--variants", "", "--save", "/home/somebody/result.json", "--naive", "dev"]
    assert command_line(argv) == 'python -m benchmarks export --variants "" --naive dev'
    assert command_line(["--save", "x", "gallery"]) == "python -m benchmarks gallery"


def test_a_result_that_cannot_be_saved_is_told_before_the_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan_validation, "run", lambda args: pytest.fail("the benchmark ran"))
    for file, why in ((tmp_path / "new" / "a.json", f"{tmp_path / 'new'} does not exist"), (tmp_path, "is a folder")):
        assert benchmarks(["plan", "--save", str(file)]) == 2
        assert f"error: --save {file}" in (said := capsys.readouterr().err)
        assert why in said


def test_words_that_match_no_build_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmarks(["compile", "--only", "klein-5b fp8"]) == 2
    assert "--only 'klein-5b fp8' matches no row; there are words: a10g, bf16, dev, fp8" in capsys.readouterr().err


def test_a_result_stands_beside_machine_versions_commit_and_date() -> None:
    facts = machine.describe()
    assert set(facts) == {"cpu", "cores", "memory_gb", "system", "versions", "commit", "date"}
    assert "torch" in facts["versions"]
    assert json.dumps(facts)


def test_a_hole_reads_as_zeros(tmp_path: Path) -> None:
    path = sparse.write_sparse({"a": (8,)}, tmp_path / "model.safetensors")
    tensor = read_header(path)["a"]
    assert path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes] == bytes(16)


def test_weights_are_drawn_so_that_products_keep_their_scale(tmp_path: Path) -> None:
    shapes: sparse.Shapes = {
        "a.weight": (256, 400),
        "a.norm.weight": (100,),
        "a.bias": (100,),
        "k.weight": (8, 4, 3, 3),
    }
    path = sparse.write_sparse(shapes, tmp_path / "model.safetensors", "F32")
    for tensor in read_header(path).values():
        export_parity._fill(tensor, np.random.default_rng(0))
    drawn = load_file(path)
    product = np.random.default_rng(1).standard_normal((50, 400)) @ drawn["a.weight"].T
    assert 0.95 < product.std() < 1.05
    assert 0.9 < drawn["k.weight"].std() * 6 < 1.1
    assert drawn["a.norm.weight"].min() >= 0.5
    assert abs(drawn["a.bias"]).max() < 1


def test_parts_of_a_variant_keep_their_widths() -> None:
    few = export_parity.with_blocks(VARIANTS["klein-4b"], "2+3").transformer
    assert (few.double_blocks, few.single_blocks, few.dim, few.joint_dim) == (2, 3, 3072, 7680)
    with pytest.raises(UsageError, match="--blocks 2x3: expected two whole numbers separated by '\\+'"):
        export_parity.with_blocks(VARIANTS["klein-4b"], "2x3")


def test_a_variant_is_named_with_the_small_decoder_or_without() -> None:
    assert export_cost._variant("dev") == VARIANTS["dev"]
    assert export_cost._variant("klein-4b-small-decoder").vae.decoder_channels == (96, 192, 384, 384)
    with pytest.raises(UsageError, match="unknown variant 'klein'; there are: klein-4b"):
        export_cost._variant("klein-small-decoder")
