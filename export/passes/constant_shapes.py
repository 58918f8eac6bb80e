"""Give Reshape a constant target, because one computed at run time costs several nodes and prevents a fusion."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from kit.graph_values import constant


def constant_shapes(model: ir.Model) -> bool:
    """Replace computed targets of Reshape by constants with 0 (copy from the input) and -1 (infer).

    A target is replaced if the shapes of input and output are known except for named axes, and all named axes of the
    output but one are at the same place in the input. Nodes that only computed the target are removed.
    """
    modified = False
    for node in model.graph:
        if node.op_type != "Reshape" or node.attributes.get_int("allowzero", 0):
            continue
        source, target, output = node.inputs[0], node.inputs[1], node.outputs[0]
        if source is None or target is None or target.const_value is not None or target.is_initializer():
            continue
        sizes = _target(source.shape, output.shape)
        if sizes is None:
            continue
        target_sizes = constant(model, f"{output.name}_shape", np.array(sizes, np.int64))
        node.replace_input_with(1, target_sizes)
        modified = True
    if modified:
        RemoveUnusedNodesPass()(model)
    return modified


def _target(source: ir.Shape | None, output: ir.Shape | None) -> list[int] | None:
    """Return the shape of the output as integers, or None if that takes more than one -1."""
    if source is None or output is None:
        return None
    sizes = []
    for axis, size in enumerate(output):
        if isinstance(size, int):
            sizes.append(size)
        elif size.value is not None and axis < len(source) and source[axis] == size:
            sizes.append(0)
        else:
            sizes.append(-1)
    fixed_zero = any(isinstance(size, int) and size == 0 for size in output)
    return None if fixed_zero or sizes.count(-1) > 1 else sizes
