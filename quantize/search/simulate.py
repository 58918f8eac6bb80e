"""Simulate quantized linear layers in torch, with the codes that `apply` writes and the rounding of a runtime.

Codes and scales come from the conversion that writes them to an artifact. Activations are rounded as ONNX's
QuantizeLinear defines it: divided by the scale, rounded to nearest, ties to even, and saturated.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from kit.recipes import Number, Scheme
from quantize.changes import Change
from quantize.products import Product, products
from quantize.scales import decode

CHUNK_VALUES = 1 << 24  # decoded weights in memory at once
CACHED_BYTES = 2 << 30  # codes that are cached, so that layers with the same input are quantized once
LOWEST = -128.0  # lower limit of QuantizeLinear; weights use only -127


@dataclass(frozen=True)
class QuantizedLinear:
    """One linear layer as it will run, with the inputs and outputs of the layer before smoothing."""

    codes: Tensor  # [K, N]
    scales: Tensor  # [], [N] or [K / block, N]
    scheme: Scheme
    activation_scale: float | None = None
    columns: Tensor | None = None  # [K], by which smoothing divides the input
    rows: Tensor | None = None  # [N], by which smoothing multiplies the output

    def output(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., N] in fp32 for an input [..., K]."""
        x = x.float()
        if self.columns is not None:
            x = x * self.columns.to(x.device).reciprocal()
        if self.activation_scale is not None:
            assert self.scheme.activations is not None
            x = round_activation(x, self.activation_scale, self.scheme.activations)
        inputs, outputs = self.codes.shape
        step = max(1, CHUNK_VALUES // inputs)
        pieces = []
        for begin in range(0, outputs, step):
            here = slice(begin, min(begin + step, outputs))
            pieces.append(x @ decode(self.codes[:, here].to(x.device), self._scales(here).to(x.device)))
        y = torch.cat(pieces, -1)
        return y if self.rows is None else y / self.rows.to(x.device)

    def _scales(self, here: slice) -> Tensor:
        match self.scheme.granularity:
            case "tensor":
                return self.scales
            case "channel":
                return self.scales[here]
            case "block":
                return self.scales[:, here].repeat_interleave(self.scheme.block, 0)


def round_activation(x: Tensor, scale: float, number: Number) -> Tensor:
    """Quantize and dequantize an activation as QuantizeLinear and DequantizeLinear do."""
    ratio = x / scale
    if number == "fp8":
        return ratio.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float() * scale
    return ratio.round().clamp(LOWEST, 127.0) * scale


def quantized_linears(change: Change) -> dict[str, QuantizedLinear]:
    """Quantize the layers of one change as `apply` does, and put together what belongs to each layer."""
    made = [_quantized(product) for product in products(change, ir.DataType.FLOAT)]
    codes = torch.cat([codes for codes, _ in made], 1)
    scales, scheme = made[0][1], change.scheme
    if len(made) > 1 and scheme.granularity == "tensor":  # a scale per product: the same for each of its columns
        scheme = replace(scheme, granularity="channel")
        scales = torch.cat([scale.expand(codes.shape[1]) for codes, scale in made])
    elif len(made) > 1:
        scales = torch.cat([scale for _, scale in made], -1)
    found, begin = {}, 0
    for linear in change.linears:
        here = slice(begin, begin + linear.outputs)
        begin += linear.outputs
        found[linear.name] = QuantizedLinear(
            codes[:, here],
            scales if scheme.granularity == "tensor" else scales[..., here],
            scheme,
            change.scale,
            change.job.columns,
            None if change.job.rows is None else change.job.rows[here],
        )
    return found


def _quantized(product: Product) -> tuple[Tensor, Tensor]:
    """Return the codes [K, N] and scales of one product."""
    job = product.job
    slots = {slot.name: bytearray(slot.nbytes) for slot in job.slots}
    for name, offset, piece in job.run(lambda done: None):
        slots[name][offset : offset + len(piece)] = piece
    outputs, inputs = job.shape
    codes = _codes(slots[job.codes_name], product.change.scheme.weights).view(inputs, outputs)
    scales = torch.frombuffer(slots[job.scales_name], dtype=torch.float32)
    return codes, scales.view(job.scales_shape)


def _codes(raw: bytearray, number: Number) -> Tensor:
    if number == "fp8":
        return torch.frombuffer(raw, dtype=torch.float8_e4m3fn)
    if number == "int8":
        return torch.frombuffer(raw, dtype=torch.int8)
    packed = torch.frombuffer(raw, dtype=torch.int8)
    return torch.stack([packed << 4 >> 4, packed >> 4], -1).view(-1)  # arithmetic shifts extend the sign


class Shelf:
    """A cache of quantized layers by name: computed on access, least recently used ones are dropped."""

    def __init__(self, changes: Iterable[Change], limit: int = CACHED_BYTES) -> None:
        self.changes = {linear.name: change for change in changes for linear in change.linears}
        self.limit = limit
        self.made: OrderedDict[str, dict[str, QuantizedLinear]] = OrderedDict()

    def __getitem__(self, layer: str) -> QuantizedLinear:
        change = self.changes[layer]
        if change.name not in self.made:
            self.made[change.name] = quantized_linears(change)
            while len(self.made) > 1 and sum(map(_bytes, self.made.values())) > self.limit:
                self.made.popitem(last=False)
        self.made.move_to_end(change.name)
        return self.made[change.name][layer]


def _bytes(made: dict[str, QuantizedLinear]) -> int:
    return sum(linear.codes.numel() for linear in made.values())
