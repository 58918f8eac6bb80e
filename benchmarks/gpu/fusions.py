"""Measure fusions of a transformer step: joined q, k and v products; modulation, text and angles once per image.

plain     the module as exported
qkv       the double blocks' projections joined (export/graphs/fusion.py)
prepared  the modulation vectors, which are the same for all requests at a timestep, the embedded text and the rotary
          angles are computed beforehand; the step computes only what changes at each step
both      qkv and prepared
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case, RunSettings, variant_of
from benchmarks.gpu.clock import clock
from benchmarks.gpu.modes import Call, Calls, Graphs, compile_blocks, mode_of
from benchmarks.gpu.parts import Measure, exact, operations, relative_error
from benchmarks.gpu.weights import inputs, random_part


def open_fusion(settings: RunSettings, _: str, fusion: str) -> Measure:
    """Set up the transformer with one choice of fusions, compiled."""
    variant = variant_of(settings)

    def measure(case: Case) -> dict[str, Any]:
        launch = mode_of("fp8", settings).launch
        reference = None
        if fusion in ("plain", "prepared"):  # joined weights have other names and so other values: no reference
            reference = exact("transformer", variant, case, settings.device)
        graph: Any = random_part("transformer", variant, "bf16", settings.device, fused=fusion in ("qkv", "both"))
        compile_blocks(graph, settings.backend)
        given = inputs("transformer", variant, case.side, case.batch, "bf16", settings.device)
        step = Prepared(graph, given) if fusion in ("prepared", "both") else graph
        wanted = {"hidden_states": given["hidden_states"]} if step is not graph else given
        call: Call = Graphs(step) if launch == "graphs" else Calls(step)
        row: dict[str, Any] = {"flops": operations("transformer", variant, case.side) * case.batch}
        if reference is not None:
            row |= {"error": relative_error(call(wanted), reference), "reference": "fp32, same weights"}
        return row | clock(lambda: call(wanted), settings.device, settings.seconds)

    return measure


class Prepared:
    """A step with precomputed modulation, text and angles in fixed memory, as CUDA graphs require."""

    @torch.no_grad()
    def __init__(self, graph: Any, given: dict[str, Tensor]) -> None:
        self.graph = graph
        self.mods = graph.modulate(given["timestep"], given["hidden_states"].dtype, given.get("guidance"))
        self.text = graph.model.context_embedder(given["encoder_hidden_states"])
        self.ropes = graph.ropes(torch.cat([given["txt_ids"], given["img_ids"]], dim=1))

    def __call__(self, hidden_states: Tensor) -> Tensor:
        velocity: Tensor = self.graph.run_blocks(hidden_states, self.text, self.mods, self.ropes)
        return velocity
