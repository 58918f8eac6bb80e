"""`export engine`: what it refuses before a build and how fast, what it writes, what an interrupt leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest

from export.__main__ import main
from kit.artifact import Manifest, PartRecord, verify
from kit.cuda_device import CudaDevice, Machine
from kit.errors import ArtifactError, UsageError
from kit.gpus import gpu
from kit.ports import PARTS, ports
from kit.recipes import recipe
from kit.variants import VARIANTS
from planner.builds import BASIS, NOT_TIMED
from runtimes.trt.build import apart
from runtimes.trt.build import artifact as engine_artifact
from runtimes.trt.build.account import account
from runtimes.trt.build.options import EngineOptions, PlannedPlan, planned
from runtimes.trt.build.refuse import judged_as, machine_refusal, refusal
from runtimes.trt.external_weights import ExternalWeights
from runtimes.trt.layer_table import from_inspector
from runtimes.trt.profiles import Sizing
from runtimes.trt.record import EngineRecord, PlanRecord
from tests.conftest import ByFamily
from tests.runtimes.bindings import load
from tests.runtimes.bindings.builder_world import LAYERS, BuilderWorld, run_here, write_graph
from tests.runtimes.bindings.real import VERSIONS, interface
from tests.runtimes.bindings.strict import StrictModule

L4 = CudaDevice("NVIDIA L4", (8, 9), 23034 * 2**20, "580.65.06")
HERE = Machine(L4, "11.4.0.106")
GB = 10**9
BEYOND = {"transformer": ("batch=1,image_tokens=256..65536",)}


def manifest(name: str = "klein-4b", recipe: str = "bf16", compute: Any = "bf16", **options: Any) -> Manifest:
    variant = VARIANTS[name]
    parts = {part: PartRecord(f"{part}/model.onnx", ports(part, variant, compute)) for part in PARTS}
    return Manifest("onnx", variant, compute, recipe, {"attention": "matmul", **options}, {}, parts)


def why(made: Manifest, options: EngineOptions, disk_free: int | None = None) -> str | None:
    return refusal(made, recipe(made.recipe), options, planned(made, options), disk_free)


@pytest.mark.parametrize(
    ("made", "options", "words"),
    [
        (manifest(recipe="fp8"), {"gpu": "a10g"}, "fp8 needs compute capability 8.9 or newer; a10g has 8.6: use"),
        (manifest("dev"), {"gpu": "l4"}, "the text encoder of dev in bf16 needs .* l4 has .* available: use --recipe"),
        (manifest(recipe="fp8", compute="fp32"), {"gpu": "l4"}, "which is for a CPU: .* export with --dtype bf16"),
        (manifest(), {"gpu": "l4", "weights": "refit"}, "one profile per plan, the transformer has 5: use --engines"),
        (manifest(recipe="fp8"), {"gpu": "l4", "hardware": "ampere-plus"}, "needs 8.9: use --hardware same-capability"),
        (manifest(), {"gpu": "h100", "stated": BEYOND}, "up to 65536 image tokens exceeds .* nearest: 16384"),
        (manifest(), {"gpu": "h100", "sizing": Sizing(references=4)}, None),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_rejected_with_the_nearest_setting(
    made: Manifest, options: dict[str, Any], words: str | None
) -> None:
    import re

    found = why(made, EngineOptions(**options))
    assert found is None if words is None else re.search(words, found or ""), found


def test_every_gpu_of_the_table_with_bf16_can_build_klein_in_its_default_recipe() -> None:
    from kit.gpus import GPUS

    for card in (card for card in GPUS.values() if card.has("bf16")):
        assert why(manifest(recipe=card.default_recipe), EngineOptions(card.name)) is None, card.name


def test_a_disk_that_is_too_small_is_rejected_sooner_for_a_plan_per_profile() -> None:
    assert "of disk space are free: use stripped plans" in (why(manifest(), EngineOptions("h100"), 5 * GB) or "")
    assert why(manifest(), EngineOptions("h100"), 20 * GB) is None
    assert "of disk space are free" in (why(manifest(), EngineOptions("h100", engines="per-profile"), 20 * GB) or "")
    assert why(manifest(), EngineOptions("h100", engines="per-profile", weights="refit"), 20 * GB) is None


@pytest.mark.parametrize(
    ("machine", "options", "words"),
    [
        (
            Machine(None, None),
            {},
            "must be built on its own GPU, and this machine has none: run this on NVIDIA L4",
        ),
        (HERE, {"gpu": "h100"}, "--gpu h100, but this machine has NVIDIA L4: use --gpu l4"),
        (Machine(replace(L4, title="Quadro"), None), {}, "this machine has Quadro: the kit does not support it"),
        (Machine(L4, None), {}, "TensorRT is not installed: pip install tensorrt-cu13"),
        (Machine(L4, "10.12.0.36"), {}, "TensorRT 10.12.0.36 is installed; the kit builds with 10.13 to 11.x"),
        (Machine(L4, "12.0.0.1"), {}, "TensorRT 12.0.0.1 is installed"),
        (HERE, {}, None),
    ],
)
def test_a_machine_that_cannot_build_is_rejected_with_the_reason(
    machine: Machine, options: dict[str, Any], words: str | None
) -> None:
    found = machine_refusal(manifest(), EngineOptions(**{"gpu": "l4", "compiler": "tensorrt", **options}), machine)
    assert found is None if words is None else words in (found or ""), found


def test_the_attention_operator_needs_a_tensorrt_that_supports_it() -> None:
    found = machine_refusal(manifest(attention="op"), EngineOptions("l4"), Machine(L4, "10.13.0.35"))
    assert "which needs TensorRT 10.14, this machine has 10.13.0.35: export with --attention matmul" in (found or "")


def test_options_decide_files_and_profiles() -> None:
    one = planned(manifest(), EngineOptions("l4", sizing=Sizing(sides=(512, 1024))))
    assert [(plan.file, len(plan.profiles)) for plan in one] == [
        ("text_encoder/model.plan", 1),
        ("transformer/model.plan", 2),
        ("vae_encoder/model.plan", 2),
        ("vae_decoder/model.plan", 2),
    ]
    split = planned(manifest(), EngineOptions("l4", parts=("transformer",), engines="per-profile"))
    assert [plan.file for plan in split][:2] == ["transformer/256.plan", "transformer/512.plan"]
    mine = EngineOptions("l4", parts=("text_encoder",), stated={"text_encoder": ("batch=1..2", "batch=3..4")})
    assert [[p.name for p in plan.profiles] for plan in planned(manifest(), mine)] == [["stated-1", "stated-2"]]


@pytest.fixture(scope="module")
def tiny(artifact_of: ByFamily) -> Path:
    return artifact_of("klein")


def build(targets: Sequence[tuple[PlannedPlan, Path]]) -> list[PlanRecord]:
    for plan, target in targets:
        target.write_bytes(plan.file.encode())
    return [PlanRecord(plan.file, plan.profiles, len(plan.file), {"layers": 1}) for plan, _ in targets]


def write(tiny: Path, out: Path, **options: Any) -> tuple[Manifest, float]:
    request = engine_artifact.check(tiny, EngineOptions(**{"gpu": "l4", "compiler": "tensorrt", **options}), out)
    return engine_artifact.write_engine(request, HERE, out, build)


def test_an_engine_artifact_verifies_and_has_a_record(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    write(tiny, out)
    made = verify(out, kinds=("engine",))
    record = EngineRecord.of(made)
    assert (record.gpu, record.device, record.tensorrt) == ("l4", L4, "11.4.0.106")
    assert made.source["artifact"] == tiny.name
    assert made.parts["transformer"].graph == "transformer/model.plan"
    assert made.parts["transformer"].ports == verify(tiny).parts["transformer"].ports
    assert [p.name for p in record.plans_of("transformer")[0].profiles] == ["256", "512", "1024", "1536", "2048"]
    assert (out / "tokenizer").is_dir()
    assert not list(out.rglob("*.safetensors")), "the weights are in the plans"


def test_plans_without_weights_come_with_links_to_graph_and_weights(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    write(tiny, out, weights="refit", engines="per-profile")
    weights = next((out / "transformer").glob("*.safetensors"))
    assert weights.samefile(tiny / "transformer" / weights.name)
    assert (out / "transformer" / "model.onnx").is_file()
    assert verify(out).parts["transformer"].graph == "transformer/256.plan"


def test_an_engine_that_is_up_to_date_is_not_built_again(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "engine"
    _, seconds = write(tiny, out)
    assert seconds > 0
    again, seconds = write(tiny, out)
    assert (again, seconds) == (verify(out), 0.0)
    _, seconds = write(tiny, out, level=5)
    assert seconds > 0, "another option is another engine"
    (out / "transformer" / "model.plan").write_bytes(b"broken")
    _, seconds = write(tiny, out, level=5)
    assert seconds > 0, "a broken plan is built again"


def test_an_interrupted_build_leaves_nothing_behind(tiny: Path, tmp_path: Path) -> None:
    def interrupted(targets: Sequence[tuple[PlannedPlan, Path]]) -> list[PlanRecord]:
        targets[0][1].write_bytes(b"half")
        raise KeyboardInterrupt

    out = tmp_path / "engine"
    request = engine_artifact.check(tiny, EngineOptions("l4", compiler="tensorrt"), out)
    with pytest.raises(KeyboardInterrupt):
        engine_artifact.write_engine(request, HERE, out, interrupted)
    assert list(tmp_path.iterdir()) == []


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "export", "engine", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])


def test_a_rejection_takes_less_than_two_seconds(tiny: Path, tmp_path: Path) -> None:
    begin = time.perf_counter()
    done = run(str(tiny), "--gpu", "l4", "--out", str(tmp_path / "e"), "--weights", "refit", "--json")
    seconds = time.perf_counter() - begin
    assert done.returncode == 2
    assert "use --engines per-profile or --weights plan" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exit_code"] == 2
    assert seconds < 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "l5"], "unknown gpu 'l5'; there are: l4, a10g"),
        (["--sides", "512,x"], "--sides: 'x' is not a number"),
        (["--sides", "100"], "side 100 is not a multiple of 16; nearest: 96 or 112"),
        (["--parts", "unet"], "--parts: unknown part 'unet'; there are: text_encoder"),
        (["--profile", "batch=1"], "--profile 'batch=1': does not start with a part; for example transformer:batch=1"),
        (["--profile", "unet:batch=1"], "--profile: unknown part 'unet'"),
        (["--profile", "transformer:batch=1"], "no range for image_tokens"),
        (["--level", "6"], "--level 6: must be between 0 and 5"),
        (["--workspace", "0"], "--workspace 0: must be more than 0"),
        (["--max-batch", "0"], "max batch 0: must be at least 1"),
        (
            ["--compiler", "tensorrt"],
            "this machine has none: run this on NVIDIA L4 24 GB, or pass --check to see what would be built",
        ),
    ],
)
def test_wrong_use_prints_one_line(
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(engine_artifact, "this_machine", lambda: Machine(None, None))
    given = ["engine", str(tiny), "--out", str(tmp_path / "e"), *words]
    assert main(given if "--gpu" in words else [*given, "--gpu", "l4"]) == 2
    assert message in capsys.readouterr().err


def test_check_prints_what_would_be_built_and_stops(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engine", str(tiny), "--gpu", "h100", "--out", str(tmp_path / "e"), "--check", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert lines[-3] == "the build is feasible for h100 with TensorRT"
    assert re.fullmatch(r"takes about: time unknown, \d+\.\d GB of memory, \d+ MB of disk", lines[-2])
    assert lines[-1] == f"  {BASIS}; {NOT_TIMED}"
    assert "transformer/model.plan           1024 (batch 1..4, image_tokens 1025..4096)" in lines
    facts = json.loads(last)
    assert facts["checked"] is True
    assert facts["estimate"]["seconds"] is None
    assert facts["estimate"]["basis"] == BASIS
    assert facts["plans"][1]["profiles"]["256"]["image_tokens"] == [16, 256, 256]
    assert list(tmp_path.iterdir()) == []


def test_check_estimates_the_time_of_a_build_ahead_of_time(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--gpu", "l4", "--compiler", "tensorrt-rtx", "--weights", "inputs"]
    assert main(["engine", str(tiny), "--out", str(tmp_path / "e"), *words, "--check", "--json"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    low, high = json.loads(last)["estimate"]["seconds"]
    assert 0 < low < high
    assert re.match(r"takes about: .* seconds on 2 cores, ", lines[-2])


@pytest.fixture(params=VERSIONS)
def trt(request: pytest.FixtureRequest) -> Iterator[StrictModule]:
    made = StrictModule(interface(request.param))
    with load.using(made):
        yield made


def test_the_whole_command_builds_every_part_of_a_real_export(
    trt: StrictModule,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A real exported artifact goes through the real signatures: parser, ports, profiles, weights by address."""
    world = BuilderWorld(trt)
    monkeypatch.setattr(apart, "run", run_here)  # a child process would not have the stand-in
    monkeypatch.setattr(engine_artifact, "this_machine", lambda: Machine(L4, trt.__version__))
    out = tmp_path / "engine"
    cache = ["--timing-cache", str(tmp_path / "timings")]
    assert main(["engine", str(tiny), "--gpu", "l4", "--out", str(out), "--json", *cache]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("transformer/model.plan ") and "products in" in line for line in lines)
    assert json.loads(lines[-1])["tensorrt"] == trt.__version__
    assert verify(out).kind == "engine"
    assert len(trt.called("Builder", "build_serialized_network_to_stream")) == 4
    stored = ExternalWeights(tiny / "vae_decoder" / "model.onnx")
    assert {name for name, _, _ in stored} <= set(world.weights)


# --- weights and precisions ------------------------------------------------------------------------------------------


def test_weights_that_are_not_where_the_graph_says_are_named(tmp_path: Path) -> None:
    graph = write_graph(tmp_path)
    file = tmp_path / "weights.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:300])
    with pytest.raises(ArtifactError, match="weights.safetensors: ends at byte 300, the weight 'small' at 392"):
        ExternalWeights(graph)
    file.unlink()
    with pytest.raises(ArtifactError, match="weights.safetensors: missing or empty; it contains the weight 'codes'"):
        ExternalWeights(graph)
    graph.write_bytes(graph.read_bytes().replace(b"weights.safetensors", b"../hts.safetensors "))
    with pytest.raises(ArtifactError, match="the weight 'codes' is in '../hts.safetensors ', outside the folder"):
        ExternalWeights(graph)
    graph.write_bytes(b"\xff\xff")
    with pytest.raises(ArtifactError, match="model.onnx: cannot be read as an ONNX graph"):
        ExternalWeights(graph)


def test_layers_count_by_their_narrowest_input_type(tmp_path: Path) -> None:
    found = account(from_inspector(json.dumps(LAYERS)), ExternalWeights(write_graph(tmp_path)).proto, gpu("l4"))
    assert {
        name: found[name] for name in ("layers", "by_precision", "products", "quantized", "missed", "reformats")
    } == {
        "layers": 3,
        "by_precision": {"fp8": 1, "bf16": 1, "fp32": 1},
        "products": {"fp8": 1, "bf16": 2},
        "quantized": {"asked": 2, "run": 1, "share": 0.5},
        "missed": ["fallen_back"],
        "reformats": 1,
    }


def test_an_inspector_that_reports_only_names_leaves_precisions_unknown(tmp_path: Path) -> None:
    layers = from_inspector('{"Layers": ["a name", "another"]}')
    found = account(layers, ExternalWeights(write_graph(tmp_path)).proto, gpu("l4"))
    assert (found["layers"], found["products"], found["quantized"]["run"]) == (2, {"unknown": 3}, 0)


@pytest.mark.gpu
def test_a_real_engine_is_built_and_generates(tiny: Path, tmp_path: Path) -> None:
    """Where TensorRT and a GPU are: build every part, load them, and compare with ONNX Runtime."""
    pytest.importorskip("tensorrt", reason="needs TensorRT")
    from kit.cuda_device import this_machine

    machine = this_machine()
    if machine.device is None or machine.device.name is None:
        pytest.skip("needs an NVIDIA GPU that kit.gpus lists")
    import numpy as np

    from pipeline.local import LocalPipeline

    out = tmp_path / "engine"
    assert main(["engine", str(tiny), "--gpu", machine.device.name, "--out", str(out), "--sides", "256"]) == 0
    asked = {"prompt": "a red circle", "seed": 7, "width": 128, "height": 128}
    engine, reference = (LocalPipeline(folder).generate(asked).pixels.astype(int) for folder in (out, tiny))
    assert np.abs(engine - reference).mean() < 2


def test_a_rejected_build_is_a_usage_error(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="supports one profile per plan"):
        write(tiny, tmp_path / "engine", weights="refit")


def test_a_user_recipe_is_judged_by_the_numbers_in_its_graphs(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    write_graph(tmp_path / "part")
    wanted = PartRecord("part/model.onnx", manifest().parts["transformer"].ports)
    made = replace(manifest(recipe="mine"), parts={"transformer": wanted})
    assert judged_as(tmp_path, made).name == "fp8"
    assert judged_as(tmp_path, replace(made, recipe="int8")).name == "int8", "a recipe of the kit's is what it says"
    graph = tmp_path / "part" / "model.onnx"
    model = onnx.ModelProto.FromString(graph.read_bytes())

    def rewritten(kind: Any, activations: bool) -> str:
        for tensor in model.graph.initializer:
            tensor.data_type = kind
        for node in model.graph.node:
            node.op_type = "QuantizeLinear" if activations else "MatMul"
        graph.write_bytes(model.SerializeToString())
        return judged_as(tmp_path, made).name

    assert rewritten(onnx.TensorProto.INT8, True) == "int8"
    assert rewritten(onnx.TensorProto.INT8, False) == "int8-weights"
    assert rewritten(onnx.TensorProto.INT4, False) == "int4-weights"
    assert rewritten(onnx.TensorProto.FLOAT, False) == "bf16"
