"""What quantization does to one linear layer, or to several with the same input."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from kit.recipes import SCHEMES, Scheme
from quantize.conversions import Quantized
from quantize.linears import Linear


@dataclass(frozen=True)
class Change:
    """The quantization of one linear layer, or of several with the same input."""

    linears: tuple[Linear, ...]
    scheme: Scheme
    job: Quantized
    scale: float | None  # of the activation, per tensor; None if only the weights are quantized

    @property
    def name(self) -> str:
        """Return the name of the first layer."""
        return self.linears[0].name

    @property
    def scheme_name(self) -> str:
        return next(name for name, scheme in SCHEMES.items() if scheme == self.scheme)

    @property
    def activation(self) -> ir.Value:
        return self.linears[0].activation
