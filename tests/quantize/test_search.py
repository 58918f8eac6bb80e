"""The mixed-precision search: what it simulates, differentiates, predicts, chooses, and says when it cannot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from export.torch_part import TorchPart, bind
from kit.artifact import read_manifest
from kit.checkpoint import resolve
from kit.errors import CheckFailed, UsageError
from kit.ports import PartName
from kit.variants import Variant
from pipeline.prompts import PromptEncoder
from pipeline.request import Limits, Request, check
from planner import flops
from quantize.__main__ import main
from quantize.apply.plan import QuantizationPlan, plan
from quantize.apply.write import FILE
from quantize.calibration import record
from quantize.gate.contract import Bound
from quantize.gate.intervals import Interval
from quantize.recipes import KEEP, RECIPES, SCHEMES, find_recipe
from quantize.search import bounds
from quantize.search.find import Search
from quantize.search.groups import Group, ImageShape, Key, everywhere, find_groups, rules
from quantize.search.ladder import Problem, climb, spread
from quantize.search.order import pick, rank_correlation, squared_error
from quantize.search.points import Measured, bisect
from quantize.search.probe import probing
from quantize.search.sensitivity import Effect, Model, State, measure
from quantize.search.simulate import Shelf, quantized_linears, round_activation
from quantize.search.subject import choose_cost, open_subject
from quantize.search.trajectory import Trajectory, denoise, go_back

TEXT = "a red circle on a white background"


def plan_of(
    artifact: Path, recipe: str, seen: record.Record | None, part: PartName = "transformer"
) -> QuantizationPlan:
    manifest = read_manifest(artifact)
    return plan(ir.load(artifact / part / "model.onnx"), artifact / part, part, manifest, RECIPES[recipe], seen)


@pytest.fixture(scope="module")
def seen(sample_record: Path) -> record.Record:
    return record.read(sample_record)


@pytest.fixture(scope="module")
def model(sample_artifact: Path) -> Model:
    variant = read_manifest(sample_artifact).variant
    parts: tuple[PartName, ...] = ("text_encoder", "transformer")
    bindings = {part: bind(part, variant, resolve("sample")) for part in parts}
    prompts = PromptEncoder(sample_artifact / "tokenizer", variant.text_encoder.kind, variant.text_tokens)
    return Model(variant, bindings, prompts, "fp32")


@pytest.fixture(scope="module")
def transformer(model: Model) -> TorchPart:
    return model.load("transformer")


# what it simulates


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int4-weights"])
def test_simulated_codes_and_scales_are_those_that_apply_writes(
    recipe: str, sample_artifact: Path, seen: record.Record, quantized_of: Callable[[str], Path]
) -> None:
    written = quantized_of(recipe)
    said = read_manifest(written).options["layers"]["transformer"]
    with safe_open(written / "transformer" / FILE, "pt") as file:
        for change in plan_of(sample_artifact, recipe, seen).changes:
            codes, scales = file.get_tensor(change.job.codes_name), file.get_tensor(change.job.scales_name)
            if change.scheme.weights == "int4":  # two in a byte, the first in the low half
                low, high = codes & 0x0F, codes >> 4
                codes = torch.stack([low, high], -1).flatten(1).to(torch.int8)
                codes = torch.where(codes > 7, codes - 16, codes)
            made = quantized_linears(change)
            assert torch.equal(torch.cat([one.codes.float() for one in made.values()], 1), codes.float())
            for name, one in made.items():
                assert one.activation_scale == said[name]["activation_scale"]
            if change.scheme.granularity == "tensor":
                assert all(torch.equal(one.scales, scales) for one in made.values())
            else:
                assert torch.equal(torch.cat([one.scales for one in made.values()], -1), scales)


def test_a_simulated_layer_gives_what_the_artifact_gives_in_onnx_runtime(
    sample_artifact: Path, seen: record.Record, quantized_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Fused, smoothed through a modulation, through a norm's rows, and with rows that carry others' smoothing."""
    layers = ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.to_out.0")
    folder = quantized_of("int8") / "transformer"
    graph = ir.load(folder / "model.onnx")
    shelf = Shelf(plan_of(sample_artifact, "int8", seen).changes)
    names: dict[str, tuple[str, str]] = {}
    for layer in layers:
        first = shelf.changes[layer].name
        quantize = next(node for node in graph.graph if node.name == f"{first}/QuantizeLinear")
        fused = next(
            (node for node in graph.graph if node.op_type == "Split" and (node.name or "").startswith(f"{first}+")),
            None,
        )
        if fused is None:
            (output,) = (n.outputs[0] for n in graph.graph if n.op_type == "MatMul" and n.name == f"{layer}/MatMul")
        else:
            output = next(value for value in fused.outputs if (value.name or "").startswith(f"{layer}/"))
        activation = quantize.inputs[0]
        assert activation is not None
        names[layer] = activation.name or "", output.name or ""
        for value in (activation, output):
            if value not in graph.graph.outputs:
                graph.graph.outputs.append(value)
    (tmp_path / FILE).hardlink_to(folder / FILE)
    ir.save(graph, tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    variant = read_manifest(sample_artifact).variant
    rng = np.random.default_rng(0)
    inputs = {
        "hidden_states": rng.standard_normal((1, 16, 128), np.float32),
        "encoder_hidden_states": rng.standard_normal(
            (1, variant.text_tokens, variant.transformer.joint_dim), np.float32
        ),
        "timestep": np.array([0.5], np.float32),
        "img_ids": np.zeros((1, 16, 4), np.int64),
        "txt_ids": np.zeros((1, variant.text_tokens, 4), np.int64),
    }
    smoothed = 0
    for layer, (activation, output) in names.items():
        x, y = (torch.from_numpy(value) for value in session.run([activation, output], inputs))
        one = shelf[layer]
        smoothed += one.columns is not None
        x = x if one.columns is None else x * one.columns
        y = y if one.rows is None else y / one.rows
        ours = one.output(x)
        assert (ours - y).abs().max() < 1e-4 * y.abs().max(), f"{layer}: {(ours - y).abs().max()} of {y.abs().max()}"
    assert smoothed, "nothing was smoothed, so the test showed too little"


@pytest.mark.parametrize(("number", "kind"), [("int8", onnx.TensorProto.INT8), ("fp8", onnx.TensorProto.FLOAT8E4M3FN)])
def test_activations_are_rounded_as_onnx_runtime_rounds_them(number: Any, kind: int) -> None:
    scale = 0.37
    steps = np.arange(-1200, 1200, dtype=np.float32) / 8  # halves and quarters of a code, and beyond the last
    x = np.concatenate([steps * np.float32(scale), np.random.default_rng(0).normal(0, 60, 4000).astype(np.float32)])
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    values = [
        onnx.helper.make_tensor("s", onnx.TensorProto.FLOAT, [], [scale]),
        onnx.helper.make_tensor("z", kind, [], [0]),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None]) for name in ("x", "y")]
    made = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "one", ends[:1], ends[1:], values),
        opset_imports=[onnx.helper.make_opsetid("", 21)],
        ir_version=10,
    )
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"x": x})
    assert torch.equal(round_activation(torch.from_numpy(x), scale, number), torch.from_numpy(theirs))


def test_quantized_layers_beyond_the_limit_make_room(sample_artifact: Path) -> None:
    changes = plan_of(sample_artifact, "int8-weights", None).changes
    shelf = Shelf(changes, limit=1)
    for change in changes[:3]:
        assert shelf[change.name].codes.shape[0] == change.job.shape[1]
    assert list(shelf.made) == [changes[2].name]


# what it differentiates


def requests_of(variant: Variant, steps: int, count: int = 1) -> list[Request]:
    size = {"width": 64, "height": 64, "steps": steps}
    return [check({"prompt": TEXT, "seed": seed, **size}, variant, Limits()) for seed in range(count)]


@contextmanager
def shifted(layer: nn.Module, by: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = layer.register_forward_hook(lambda module, args, output: output + by(output))
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.parametrize("guidance", ["none", "cfg"])
def test_going_back_gives_the_slope_that_finite_differences_measure(
    guidance: Any, model: Model, transformer: TorchPart
) -> None:
    """At a layer, through all steps that follow; with guidance through both passes."""
    variant = replace(model.variant, guidance=guidance)
    (request,) = requests_of(variant, steps=2)
    request = replace(request, guidance=3.0)
    shape = (variant.text_tokens, variant.transformer.joint_dim)
    rng = np.random.default_rng(1)
    embeds: dict[str, Any] = {text: rng.standard_normal(shape, np.float32) for text in (TEXT, request.negative_prompt)}
    name = "single_transformer_blocks.1.attn.to_out"
    layer: Any = transformer.linears()[name]
    pattern = torch.randn(layer.out_features, generator=torch.Generator().manual_seed(2))

    def final(size: float) -> Trajectory:
        with shifted(layer, lambda output: size * pattern):
            return denoise(transformer, variant, [request], embeds)

    size = 1e-2
    moved = torch.from_numpy(final(size).latents.astype(np.float64) - final(-size).latents) / (2 * size)
    u = (moved / moved.norm()).float()  # where it moves most: the difference stands out of fp32's rounding
    path = final(0.0)
    shares: list[Tensor] = []
    with probing({name: layer}, lambda layer, weight, x, gradient: shares.append((gradient * pattern).sum())):
        go_back(transformer, path, u)
    assert len(shares) == 2
    assert float(sum(shares)) == pytest.approx(float(moved.norm()), rel=0.01)


def test_probing_leaves_the_model_as_it_was(model: Model, transformer: TorchPart) -> None:
    (request,) = requests_of(model.variant, steps=1)
    embeds: dict[str, Any] = {
        TEXT: np.ones((model.variant.text_tokens, model.variant.transformer.joint_dim), np.float32)
    }
    before = denoise(transformer, model.variant, [request], embeds)
    with probing(transformer.linears(), lambda *seen: None):
        go_back(transformer, before, torch.ones(before.latents.shape))
    assert all("forward" not in layer.__dict__ for layer in transformer.linears().values())
    assert np.array_equal(denoise(transformer, model.variant, [request], embeds).latents, before.latents)


def test_effects_are_those_of_quantized_weights_in_the_model_itself(
    sample_artifact: Path, seen: record.Record, model: Model
) -> None:
    """A group of the transformer and one of the text encoder, each run quantized, against their predictions."""
    manifest = read_manifest(sample_artifact)
    image = ImageShape(16, 2, 1)
    recipe = RECIPES["int4-weights"]  # coarse, so that the effect stands out of rounding
    subject = open_subject(sample_artifact, manifest, model, recipe, None, KEEP, image)
    wanted: list[Key] = [("transformer", "single_transformer_blocks.0.attn.to_qkv_mlp_proj")]
    groups = {key: group for key, group in subject.groups.items() if key in wanted}
    assert list(groups) == wanted
    requests = requests_of(model.variant, steps=2, count=12)
    effects = measure(model, groups, subject.shelves, requests, batch=12)
    found = effects[wanted[0], "quantized"]
    transformer, encoder = model.load("transformer"), model.load("text_encoder")
    tokens = model.prompts.encode(TEXT)
    inputs = {"input_ids": tokens.input_ids[None], "attention_mask": tokens.attention_mask[None]}
    embeds = {TEXT: encoder.run(inputs)["prompt_embeds"][0]}
    exact = denoise(transformer, model.variant, requests, embeds).latents
    layer: Any = transformer.linears()[wanted[0][1]]
    quantized = subject.shelves["quantized"]["transformer"][wanted[0][1]]
    layer.forward = quantized.output
    moved = denoise(transformer, model.variant, requests, embeds).latents - exact
    measured = float(np.mean((moved**2).sum((1, 2)) / (exact**2).sum((1, 2))))
    assert found.final == pytest.approx(measured, rel=0.9)  # twelve squared normal numbers scatter by 40 %
    assert found.final > measured / 3
    assert 0 < found.local < 0.1


# what it costs


def test_the_groups_operations_are_those_that_the_kit_counts(sample_artifact: Path, seen: record.Record) -> None:
    variant = read_manifest(sample_artifact).variant
    image = ImageShape(image_tokens=64, steps=4, passes=2)
    for part, linears in (
        ("transformer", 4 * flops.transformer(variant.transformer, 64, variant.text_tokens).linears),
        ("text_encoder", flops.text_encoder(variant.text_encoder, variant.text_tokens).linears),
    ):
        groups = find_groups(part, variant, plan_of(sample_artifact, "fp8", seen, part), image)  # type: ignore[arg-type]
        assert sum(group.operations for group in groups) == pytest.approx(2 * linears)


def test_sparing_for_weights_in_int8_gives_up_fewer_bytes(sample_artifact: Path) -> None:
    variant, made = read_manifest(sample_artifact).variant, plan_of(sample_artifact, "int4-weights", None)
    kept, int8 = (
        sum(group.bytes for group in find_groups("transformer", variant, made, ImageShape(64, 4, 1), scheme))
        for scheme in (None, SCHEMES["int8-weights"])
    )
    weights = sum(linear.inputs * linear.outputs for change in made.changes for linear in change.linears)
    assert int8 == weights // 2
    assert kept in (weights * 2 - weights // 2, weights * 4 - weights // 2)  # stored in bf16 or fp32


def test_a_recipe_that_gives_nothing_to_search_is_refused() -> None:
    with pytest.raises(UsageError, match="recipe fp32 quantizes nothing, so there is nothing to search"):
        choose_cost(RECIPES["fp32"], KEEP, None)
    with pytest.raises(UsageError, match="--spare int8-weights is what recipe int8-weights does everywhere"):
        choose_cost(RECIPES["int8-weights"], "int8-weights", None)
    with pytest.raises(UsageError, match="computes nothing in fewer bits; search it with --cost bytes"):
        choose_cost(RECIPES["int4-weights"], KEEP, "operations")
    assert choose_cost(RECIPES["int8"], KEEP, None) == "operations"
    assert choose_cost(RECIPES["int4-weights"], KEEP, None) == "bytes"


def test_rules_spare_exactly_the_layers_of_their_groups() -> None:
    groups = {("transformer", n): Group("transformer", n, (n, f"{n}b"), 1.0, 1) for n in ("x.1", "x.2")}
    made = rules(groups, frozenset({("transformer", "x.2")}), KEEP)  # type: ignore[arg-type]
    assert [(rule.layers, rule.scheme) for rule in made] == [("x.2", KEEP), ("x.2b", KEEP)]
    assert {rule.scheme for rule in everywhere(RECIPES["int8"], "int8-weights").rules} == {"int8-weights"}


# what it chooses


def problem_of(effects: list[float], costs: list[float]) -> Problem:
    keys: list[Key] = [("transformer", str(index)) for index in range(len(effects))]
    groups = {key: Group("transformer", key[1], (key[1],), cost, 1) for key, cost in zip(keys, costs, strict=True)}
    return Problem(
        groups, {(key, "quantized"): effect for key, effect in zip(keys, effects, strict=True)}, "operations", True
    )


@pytest.mark.parametrize("seed", range(5))
def test_every_rung_is_an_exact_optimum(seed: int) -> None:
    rng = random.Random(seed)
    problem = problem_of([rng.lognormvariate(0, 2) for _ in range(8)], [rng.uniform(1, 5) for _ in range(8)])
    rungs = climb(problem)
    assert [len(rung.spared) for rung in rungs] == list(range(9))
    for rung in rungs:
        better = [
            some
            for size in range(9)
            for some in combinations(problem.groups, size)
            if problem.spent(frozenset(some)) < rung.cost + 1e-12
            and problem.predict(frozenset(some)) < rung.predicted - 1e-12
        ]
        assert not better


def smoothing_problem(unsmoothed: float) -> Problem:
    maker, reader, other = (("transformer", name) for name in ("maker", "reader", "other"))
    groups: dict[Key, Group] = {
        maker: Group("transformer", "maker", ("maker",), 1.0, 1),  # type: ignore[dict-item]
        reader: Group("transformer", "reader", ("reader",), 1.0, 1, ("maker",), smoothed=True),  # type: ignore[dict-item]
        other: Group("transformer", "other", ("other",), 1.0, 1),  # type: ignore[dict-item]
    }
    effects = {(maker, "quantized"): 5.0, (reader, "quantized"): 1.0, (other, "quantized"): 2.0}
    return Problem(groups, effects | {(reader, "unsmoothed"): unsmoothed}, "operations", True)  # type: ignore[arg-type]


def test_a_group_that_smooths_another_is_spared_with_it() -> None:
    assert [key[1] for key in climb(smoothing_problem(50.0))[-1].spared][:2] in (
        ["maker", "reader"],
        ["other", "maker"],
    )
    costly = climb(smoothing_problem(50.0))
    assert all(rung.predicted <= costly[0].predicted for rung in costly)
    assert [key[1] for key in climb(smoothing_problem(1.0))[1].spared] == ["maker"]


def test_sparing_a_maker_counts_the_smoothing_that_is_lost() -> None:
    problem = smoothing_problem(50.0)
    assert problem.predict(frozenset()) == 8.0
    assert problem.predict(frozenset({("transformer", "maker")})) == 52.0
    assert problem.predict(frozenset({("transformer", "maker"), ("transformer", "reader")})) == 2.0


def test_points_are_spread_over_the_cost_with_both_ends() -> None:
    rungs = climb(problem_of([float(9 - index) for index in range(9)], [1.0] * 9))
    assert spread(rungs, 4) == [0, 3, 6, 9]
    assert spread(rungs, 2) == [0, 9]
    assert spread(rungs, 50) == list(range(10))


def test_bisection_measures_few_rungs_and_finds_the_first_that_meets() -> None:
    asked: list[int] = []

    def meets(index: int) -> bool:
        asked.append(index)
        return index >= 23

    assert bisect(0, 64, meets) == 23
    assert len(asked) == 6


def search_of(
    psnr: Callable[[int], float], wanted: list[Bound], spare: str = KEEP, alone: int = 0
) -> tuple[Search, list[str]]:
    drawn: list[str] = []
    problem = problem_of([float(2**index) for index in range(10)], [1.0] * 10)

    def draw(name: str, made: tuple[Any, ...]) -> Measured:
        drawn.append(name)
        value = psnr(len(made))
        return Measured({"psnr": Interval(value, value, value, 4, 4)}, 10 ** (-value / 10), 1)

    effects: dict[tuple[Key, State], Effect] = {
        (key, "quantized"): Effect(problem.effects[key, "quantized"], 0.01) for key in problem.groups
    }
    return Search(problem, effects, "int8", spare, draw, 3, wanted, alone), drawn


def test_the_cheapest_rung_that_keeps_the_bound_is_chosen_and_none_is_drawn_twice() -> None:
    search, drawn = search_of(lambda spared: 30.0 + spared, [Bound("psnr", 37)])
    found = search.run()
    assert found.chosen is not None
    assert (found.chosen.name, len(found.chosen.rung.spared)) == ("int8-spare-7", 7)
    assert len(drawn) == len(set(drawn)) <= search.most_drawings()
    assert [point.name for point in found.points] == sorted(drawn, key=lambda name: int(name.split("-")[-1]))


def test_sparing_everything_is_no_answer() -> None:
    search, _ = search_of(lambda spared: 100.0 if spared == 10 else 30.0, [Bound("psnr", 50)])
    assert search.run().chosen is None
    search, _ = search_of(lambda spared: 100.0 if spared == 10 else 30.0, [Bound("psnr", 50)], spare="int8-weights")
    chosen = search.run().chosen
    assert chosen is not None
    assert len(chosen.rung.spared) == 10


def test_groups_alone_tell_whether_the_order_is_right() -> None:
    search, drawn = search_of(lambda spared: 40.0, [], alone=4)
    assert search.run().correlations["predicted, latents"] is None  # all measured alike
    assert drawn.count("int8-alone") == 4
    assert [key[1] for key in pick(search.problem, 3)] == ["9", "5", "0"]
    assert rank_correlation([1.0, 2.0, 3.0], [10.0, 20.0, 30.0]) == pytest.approx(1.0)
    assert rank_correlation([1.0, 2.0], [1.0, 2.0]) is None
    assert squared_error(20.0) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("psnr", "--meet 'psnr': expected METRIC=VALUE, as in psnr=45"),
        ("sharpness=3", "unknown metric 'sharpness'; there are: psnr, ssim"),
        ("psnr=high", "--meet psnr=high: 'high' is not a number"),
        ("psnr=nan", "'nan' is not a number"),
    ],
)
def test_a_quality_that_cannot_be_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        bounds.parse(text)


def test_a_quality_is_a_bound_of_the_gate() -> None:
    assert (bounds.parse("psnr=45").side, bounds.parse("flip=0.1").side) == ("at_least", "at_most")


# the command


def words(artifact: Path, seen: Path, out: Path, *more: str) -> list[str]:
    small = [
        "--prompts",
        "sample:2",
        "--samples",
        "1",
        "--points",
        "2",
        "--width",
        "64",
        "--height",
        "64",
        "--steps",
        "1",
    ]
    source = ["--checkpoint", "sample", "--recipe", "int8", "--calibration", str(seen), "--out", str(out)]
    return ["search", str(artifact), *source, *small, *more]


def test_a_search_leaves_table_plot_facts_and_a_recipe_that_apply_takes(
    sample_artifact: Path, sample_record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found"
    assert main([*words(sample_artifact, sample_record, out, "--meet", "psnr=1"), "--json"]) == 0
    printed = capsys.readouterr().out
    facts = json.loads(printed.splitlines()[-1])
    assert facts["chosen"] == "int8-spare-0"
    assert sorted(path.name for path in out.iterdir()) == [
        "recipe.json",
        "recipes",
        "search.json",
        "search.md",
        "search.png",
    ]
    assert (out / "search.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "search.md").read_text() in printed
    assert find_recipe(str(out / "recipe.json")).rules == RECIPES["int8"].rules
    whole = json.loads((out / "search.json").read_text())
    first, last = whole["points"]
    assert first["predicted"] > last["predicted"]
    assert first["metrics"]["psnr"]["mean"] <= last["metrics"]["psnr"]["mean"]
    assert first["bytes"] < last["bytes"]
    spared = find_recipe(str(out / "recipes" / f"{last['name']}.json"))
    assert spared.scheme("transformer", "transformer_blocks.0.attn.to_q") is None
    assert spared.scheme("text_encoder", "layers.0.mlp.down_proj") == "int8-weights"  # its products were never in int8


def test_a_search_that_nothing_satisfies_keeps_its_report_and_exits_with_1(
    sample_artifact: Path,
    sample_record: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from quantize.search import command as search_command

    def found(args: Any, wanted: Any, folder: Path) -> dict[str, Any]:
        (folder / "search.json").write_text("{}")
        return {"chosen": None}

    monkeypatch.setattr(search_command, "_search", found)
    monkeypatch.setattr(search_command, "_told", lambda facts: "")
    assert main(words(sample_artifact, sample_record, tmp_path / "out", "--meet", "psnr=99")) == CheckFailed.exit_code
    assert "no recipe of this search keeps psnr at least 99; see" in capsys.readouterr().err
    assert (tmp_path / "out" / "search.json").is_file()


def test_an_interrupted_search_leaves_nothing(
    sample_artifact: Path, sample_record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantize.search import points

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(points.Studio, "draw", interrupted)
    assert main(words(sample_artifact, sample_record, tmp_path / "out")) == 130
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--points", "1"], "--points 1 is less than 2"),
        (["--alone", "-1"], "--alone -1 is less than 0"),
        (["--recipe", "int9"], "unknown recipe 'int9'; a search starts from one of: fp32, bf16, fp8"),
        (["--recipe", "bf16"], "recipe bf16 quantizes nothing"),
        (["--meet", "lpips=0.1", "--recipe", "int8"], "cannot be measured here, because"),
        (["--device", "cuda:7"], "--device cuda:7: torch finds no CUDA GPU here"),
        (["--width", "65"], "width"),
    ],
)
def test_wrong_use_is_told_before_anything_runs(
    more: list[str],
    message: str,
    sample_artifact: Path,
    sample_record: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(words(sample_artifact, sample_record, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_missing_matplotlib_is_told_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from quantize.search import plot

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="draws its result with matplotlib: pip install matplotlib"):
        plot.check()


def test_another_checkpoint_than_the_artifacts_is_refused(
    sample_artifact: Path, seen: record.Record, model: Model
) -> None:
    manifest = read_manifest(sample_artifact)
    binding = model.bindings["transformer"]
    layer = "transformer_blocks.0.attn.to_q.weight"
    other = replace(
        binding, tensors={**binding.tensors, layer: binding.tensors["transformer_blocks.0.attn.to_k.weight"]}
    )
    wrong = replace(model, bindings={**model.bindings, "transformer": other})
    with pytest.raises(UsageError, match="to_q in the transformer has other weights; name that checkpoint"):
        open_subject(sample_artifact, manifest, wrong, RECIPES["int8"], seen, KEEP, ImageShape(16, 1, 1))
