"""Choose SmoothQuant factors per site, from the calibration record and the weights alone.

The factors are s = max|x|^a / max|w|^(1-a) per channel. Alpha `a` is chosen from ALPHAS, or s = 1, to minimize the
expected error. With a uniform rounding error of step^2 / 12 in each number, the error of a product x W is

    step_x^2 / 12 * sum_k s_k^2 |W_k|^2  +  sum_n step_n^2 / 12 * sum_k E[x_k^2] / s_k^2

where step_x and step_n follow from the largest magnitudes after smoothing. Factors are powers of two, so folding them
rounds nothing, and the bf16 and fp32 forms of an artifact hold the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kit.recipes import SCHEMES, Scheme
from quantize.calibration.record import Seen
from quantize.linears import Linear
from quantize.row_reader import read_rows
from quantize.scales import LARGEST
from quantize.sites import Site

ALPHAS = tuple(i / 20 for i in range(2, 20))
SAMPLED_ROWS, RUN = 512, 32  # rows of a weight that are read, in runs of consecutive rows


@dataclass(frozen=True)
class Smoothing:
    """The choice for one site."""

    site: Site
    factors: Tensor  # s [K]
    alpha: float | None  # None: s = 1, smoothing does not help
    gain: float  # expected error without smoothing / with smoothing

    @property
    def inverse(self) -> Tensor:
        return self.factors.reciprocal()


@dataclass(frozen=True)
class Reader:
    """One linear layer that reads a site: its input statistics, its scheme and some rows of its weight."""

    seen: Seen
    scheme: Scheme
    rows: Tensor  # [R, K]
    share: float  # rows of the whole weight per sampled row


def choose_all(
    sites: Sequence[Site], linears: Mapping[str, Linear], schemes: Mapping[str, str], seen: Mapping[str, Seen]
) -> dict[str, Smoothing]:
    """Choose factors, by site name, for every site whose layers are all quantized to int8."""
    chosen = {}
    for site in sites:
        involved = [*site.readers, *(rows.layer for rows in site.rows)]
        if not all(name in linears and schemes.get(name) for name in involved):
            continue
        if not all(SCHEMES[schemes[name]].activations == "int8" for name in site.readers):
            continue
        if any(SCHEMES[schemes[rows.layer]].granularity != "channel" for rows in site.rows):
            continue  # only a scale per row absorbs the factor of a row
        readers = [_reader(linears[name], SCHEMES[schemes[name]], seen[name]) for name in site.readers]
        chosen[site.name] = choose(site, readers)
    return chosen


def _reader(linear: Linear, scheme: Scheme, seen: Seen) -> Reader:
    count = linear.outputs
    if count <= SAMPLED_ROWS:
        rows = read_rows(linear.weight, 0, count)
    else:
        starts = torch.linspace(0, count - RUN, SAMPLED_ROWS // RUN).long().tolist()
        rows = torch.cat([read_rows(linear.weight, start, start + RUN) for start in starts])
    return Reader(seen, scheme, rows * linear.scale, count / len(rows))


def choose(site: Site, readers: Sequence[Reader]) -> Smoothing:
    """Choose the factors of one site."""
    largest = torch.stack([torch.from_numpy(reader.seen.channel_amax) for reader in readers]).amax(0)  # [K]
    weights = torch.stack([reader.rows.abs().amax(0) for reader in readers]).amax(0)  # [K]
    plain = torch.ones_like(largest)
    without = sum(expected_error(reader, plain) for reader in readers)
    best, alpha, least = plain, None, without
    for candidate in ALPHAS:
        factors = factors_at(candidate, largest, weights, site.heads)
        error = sum(expected_error(reader, factors) for reader in readers)
        if error < least:
            best, alpha, least = factors, candidate, error
    return Smoothing(site, best, alpha, without / least if least > 0 else 1.0)


def factors_at(alpha: float, largest: Tensor, weights: Tensor, heads: tuple[int, int, int] | None = None) -> Tensor:
    """Return s [K] for one alpha, in powers of two; 1 for channels whose activations or weights are all zero."""
    dead = (largest <= 0) | (weights <= 0)
    if heads is not None:  # query heads of one key head read the same values, so they share factors
        keys, queries, width = heads
        largest = largest.view(keys, queries, width).amax(1, keepdim=True).expand(-1, queries, -1).reshape(-1)
        weights = weights.view(keys, queries, width).amax(1, keepdim=True).expand(-1, queries, -1).reshape(-1)
        dead = (largest <= 0) | (weights <= 0)
    exponent = alpha * largest.clamp(min=1e-30).log2() - (1 - alpha) * weights.clamp(min=1e-30).log2()
    alive = exponent[~dead]
    if not len(alive):
        return torch.ones_like(largest)
    exponent = (exponent - alive.mean()).round().clamp(-10, 10)  # a common factor changes nothing
    return torch.where(dead, torch.ones_like(largest), torch.exp2(exponent))


def expected_error(reader: Reader, factors: Tensor) -> float:
    """Return the expected squared error of a layer's outputs, relative to their squared size."""
    x_amax = torch.from_numpy(reader.seen.channel_amax)
    x_square = torch.from_numpy(reader.seen.channel_square)
    top = LARGEST[reader.scheme.weights]
    smoothed = reader.rows * factors
    x_step = (x_amax / factors).max() / top
    from_x = x_step**2 / 12 * smoothed.square().sum()
    row_amax = smoothed.abs().amax(1)
    if reader.scheme.granularity == "tensor":
        row_amax = row_amax.max().expand_as(row_amax)
    from_w = ((row_amax / top) ** 2).sum() / 12 * (x_square / factors.square()).sum()
    size = (reader.rows.square() * x_square).sum()
    return float((from_x + from_w) / size.clamp(min=1e-30))


def activation_amax(seen: Seen, factors: Tensor | None, percentile: float) -> float:
    """Return the magnitude that the largest code of an activation represents, after smoothing."""
    clipped = seen.percentile(percentile) / seen.amax if seen.amax > 0 else 1.0
    if factors is None:
        return clipped * seen.amax
    return clipped * float((torch.from_numpy(seen.channel_amax) / factors).max())
