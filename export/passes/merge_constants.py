"""Merge equal constants: shapes, axes and scalars repeat in every block."""

from __future__ import annotations

import onnx_ir as ir


def merge_constants(model: ir.Model) -> bool:
    """Replace embedded initializers by the first equal one; external ones (weights) are neither changed nor read."""
    first: dict[tuple[object, ...], ir.Value] = {}
    modified = False
    for name, value in list(model.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or value.is_graph_output():
            continue
        key = (tensor.dtype, tuple(tensor.shape), tensor.tobytes())
        kept = first.setdefault(key, value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            del model.graph.initializers[name]
            modified = True
    return modified
