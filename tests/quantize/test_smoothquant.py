"""SmoothQuant: folding changes no result, factors are powers of two, and expected errors match measured ones."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from kit.artifact import read_manifest
from kit.ports import PartName
from kit.recipes import SCHEMES, Scheme
from quantize.calibration.observe import Watch
from quantize.fold import fold, weight_factors
from quantize.linears import Linear, find_linears
from quantize.row_reader import read_rows
from quantize.scales import amax, decode, encode, scale_of
from quantize.sites import Site, sites
from quantize.smoothquant import ALPHAS, Reader, Smoothing, activation_amax, choose, expected_error, factors_at

SITE = Site(("layer",), "modulation")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_smoothing(site: Site, inputs: int, seed: int) -> Smoothing:
    """Draw factors between 1/8 and 8; query heads that share a key head share theirs."""
    random = torch.Generator().manual_seed(seed)
    if site.heads is None:
        exponents = torch.randint(-3, 4, (inputs,), generator=random)
    else:
        keys, queries, width = site.heads
        exponents = torch.randint(-3, 4, (keys, 1, width), generator=random).expand(-1, queries, -1).reshape(-1)
    return Smoothing(site, torch.exp2(exponents.float()), 0.5, 1.0)


def folded(artifact: Path, part: PartName, only: str) -> tuple[ir.Model, int]:
    """Smooth every site of one kind at random and fold the inverses, without quantizing anything."""
    manifest = read_manifest(artifact)
    model = ir.load(artifact / manifest.part(part).graph)
    ir.external_data.set_base_dir(model.graph, artifact / part)
    linears = {linear.name: linear for linear in find_linears(model, artifact / part)}
    chosen = {
        site.name: random_smoothing(site, linears[site.name].inputs, seed)
        for seed, site in enumerate(sites(part, manifest.variant))
        if only == ("heads" if site.heads else site.fold)
    }
    columns, rows = weight_factors(chosen, linears)
    norms = fold(model, chosen, linears, ir.DataType.FLOAT)
    for name in columns.keys() | rows.keys():
        values = read_rows(linears[name].weight, 0, linears[name].outputs)
        values = values * columns.get(name, torch.ones(1)) * rows.get(name, torch.ones(len(values)))[:, None]
        hold(model, linears[name].weight.name, values)
    for name, factor in norms.items():
        held = model.graph.initializers[name].const_value
        assert held is not None
        hold(model, name, torch.from_numpy(np.asarray(held.numpy()).astype(np.float32)) * factor)
    return model, len(chosen)


def hold(model: ir.Model, name: str, values: Tensor) -> None:
    """Replace a stored weight by values of the same type; powers of two round nothing."""
    value = model.graph.initializers[name]
    assert value.dtype is not None
    array = values.numpy().astype(value.dtype.numpy())
    assert np.array_equal(array.astype(np.float32), values.numpy())
    value.const_value = ir.Tensor(array, dtype=value.dtype, name=name)


def outputs(graph: Path, feeds: dict[str, npt.NDArray[np.generic]]) -> npt.NDArray[np.float32]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    result: npt.NDArray[np.float32] = ort.InferenceSession(graph, options).run(None, feeds)[0]
    return result


def feeds_of(artifact: Path, part: PartName) -> dict[str, npt.NDArray[np.generic]]:
    random = np.random.default_rng(0)
    feeds: dict[str, npt.NDArray[np.generic]] = {}
    for port in read_manifest(artifact).part(part).ports.inputs:
        shape = port.shape({"batch": 1, "image_tokens": 16})
        whole = port.dtype == "i64"
        feeds[port.name] = random.integers(0, 9, shape) if whole else random.random(shape, dtype=np.float32)
    if "attention_mask" in feeds:
        feeds["attention_mask"] = np.ones_like(feeds["attention_mask"])
    return feeds


@pytest.mark.parametrize(
    ("part", "only", "count"),
    [
        ("transformer", "modulation", 2 * 4 + 4),
        ("transformer", "rows", 2 * 3 + 4),
        ("text_encoder", "norm", 27 * 2),
        ("text_encoder", "heads", 27),
        ("text_encoder", "rows", 27),
    ],
)
def test_a_graph_that_is_smoothed_but_not_quantized_computes_the_same(
    sample_artifact: Path, tmp_path: Path, part: PartName, only: str, count: int
) -> None:
    copy = shutil.copytree(sample_artifact, tmp_path / "copy")  # onnx_ir does not open files with hard links
    model, smoothed = folded(copy, part, only)
    assert smoothed == count
    ir.save(model, tmp_path / "model.onnx", external_data="weights.bin")
    feeds = feeds_of(sample_artifact, part)
    before = outputs(sample_artifact / part / "model.onnx", feeds)
    difference = np.abs(outputs(tmp_path / "model.onnx", feeds) - before).max() / np.abs(before).max()
    assert difference <= 1e-6, f"{difference:.1e} of the scale"


def linear_of(model: ir.Model, folder: Path, name: str) -> Linear:
    return next(linear for linear in find_linears(model, folder) if linear.name == name)


def test_inputs_that_are_not_norms_cannot_be_smoothed(sample_artifact: Path) -> None:
    from quantize.fold import fold_modulation, norm_weight

    model = ir.load(sample_artifact / "transformer" / "model.onnx")
    linear = linear_of(model, sample_artifact / "transformer", "transformer_blocks.0.ff.linear_out")
    with pytest.raises(
        ValueError, match=r"ff\.linear_out: its input is not a norm with scale and shift; it cannot be smo"
    ):
        fold_modulation(model, linear, torch.ones(linear.inputs), ir.DataType.FLOAT)
    with pytest.raises(
        ValueError, match=r"ff\.linear_out: its input is not a norm with a weight; it cannot be smoothed"
    ):
        norm_weight(linear)


class Layer:
    """One linear layer with outliers in some channels of its input, as in trained transformers."""

    def __init__(self, scheme: str = "int8", outlier: float = 30.0, seed: int = 0) -> None:
        self.x = noise(512, 256, seed=seed)  # [rows, K]
        self.x[:, ::37] *= outlier
        self.w = noise(128, 256, seed=seed + 1) * torch.exp(noise(128, 1, seed=seed + 2))  # [N, K]
        watch = Watch()
        watch.see(self.x, 0)
        self.reader = Reader(watch.seen("w"), SCHEMES[scheme], self.w, 1.0)

    def measured(self, factors: Tensor, scheme: Scheme | None = None) -> float:
        """Quantize and multiply as a runtime does; returns the squared error over the squared size."""
        scheme = scheme or self.reader.scheme
        x, w = self.x / factors, self.w * factors
        scale = torch.tensor(activation_amax(self.reader.seen, factors, 100) / 127)
        x = decode(encode(x.clone(), scale, "int8"), scale)
        scales = scale_of(amax(w, 1), "int8")[:, None] if scheme.granularity == "channel" else scale_of(amax(w), "int8")
        y = x @ decode(encode(w, scales, "int8"), scales).T
        exact = self.x.double() @ self.w.double().T
        return float((y - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("scheme", ["int8", "int8-tensor"])
@pytest.mark.parametrize("outlier", [1.0, 10.0, 30.0])
def test_the_expected_error_is_the_measured_one_within_a_factor_of_two(scheme: str, outlier: float) -> None:
    layer = Layer(scheme, outlier)
    for factors in (torch.ones(256), choose(SITE, [layer.reader]).factors):
        expected, measured = expected_error(layer.reader, factors), layer.measured(factors)
        assert 0.5 <= expected / measured <= 2, f"expected {expected:.2e}, measured {measured:.2e}"


def test_smoothing_beats_plain_int8_and_per_channel_beats_per_tensor() -> None:
    layer = Layer(outlier=30.0)
    smoothing, plain = choose(SITE, [layer.reader]), torch.ones(256)
    assert smoothing.alpha in ALPHAS
    assert layer.measured(plain) > 5 * layer.measured(smoothing.factors)
    assert smoothing.gain > 5
    per_tensor = replace(layer.reader.scheme, granularity="tensor")
    assert layer.measured(smoothing.factors, per_tensor) > 2 * layer.measured(smoothing.factors)


def test_without_outliers_smoothing_does_no_harm() -> None:
    layer = Layer(outlier=1.0)
    smoothing = choose(SITE, [layer.reader])
    assert smoothing.gain >= 1
    assert layer.measured(smoothing.factors) <= 1.1 * layer.measured(torch.ones(256))


def test_the_alpha_is_the_one_with_the_least_error() -> None:
    layer = Layer()
    seen, weights = torch.from_numpy(layer.reader.seen.channel_amax), layer.w.abs().amax(0)
    errors = {alpha: expected_error(layer.reader, factors_at(alpha, seen, weights)) for alpha in ALPHAS}
    assert choose(SITE, [layer.reader]).alpha == min(errors, key=lambda alpha: errors[alpha])


def test_factors_are_powers_of_two_and_one_for_dead_channels() -> None:
    largest, weights = noise(64).abs() * 100, noise(64, seed=1).abs()
    largest[3], weights[5] = 0, 0
    for alpha in ALPHAS:
        factors = factors_at(alpha, largest, weights)
        assert torch.equal(factors.log2(), factors.log2().round())
        assert factors.max() <= 2**10
        assert factors.min() >= 2**-10
        assert factors[3] == factors[5] == 1
    assert torch.equal(factors_at(0.5, torch.zeros(8), weights[:8]), torch.ones(8))


def test_query_heads_that_share_a_key_head_share_their_factors() -> None:
    factors = factors_at(0.5, noise(2 * 3 * 8).abs() * 50, noise(2 * 3 * 8, seed=1).abs(), heads=(2, 3, 8))
    grouped = factors.view(2, 3, 8)
    assert torch.equal(grouped, grouped[:, :1].expand(-1, 3, -1))
    assert len(set(factors.tolist())) > 2


def test_a_percentile_clips_the_activation_in_proportion() -> None:
    layer = Layer()
    seen = layer.reader.seen
    assert activation_amax(seen, None, 100) == seen.amax
    assert activation_amax(seen, None, 99) == pytest.approx(seen.percentile(99))
    factors = torch.full((256,), 4.0)
    assert activation_amax(seen, factors, 99) == pytest.approx(seen.percentile(99) / 4)
