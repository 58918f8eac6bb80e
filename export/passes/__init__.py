"""Graph passes, each of which changes a model in place and returns whether it did."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass

from export.passes.clean import clean
from export.passes.constant_shapes import constant_shapes
from export.passes.merge_constants import merge_constants
from export.passes.name_axes import name_axes
from export.passes.name_nodes import name_nodes

Pass = Callable[[ir.Model], bool]
PIPELINE: tuple[Pass, ...] = (clean, constant_shapes, name_axes, merge_constants, name_nodes)


def simplify(model: ir.Model) -> None:
    """Run all passes in order, then remove the metadata of torch's exporter about scopes and source files."""
    for step in PIPELINE:
        step(model)
    ClearMetadataAndDocStringPass()(model)
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
