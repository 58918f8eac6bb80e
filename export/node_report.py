"""Count the operators inside one block of each kind, before and after the graph passes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

import onnx_ir as ir

from export.passes.name_nodes import module_path

KINDS: Mapping[str, str] = {
    "transformer_blocks": "double",
    "single_transformer_blocks": "single",
    "layers": "text layer",
}
OF_A_WEIGHT = " of a weight"  # a Cast or Transpose of a weight alone: TensorRT folds it during the build
_BLOCK = re.compile(rf"({'|'.join(KINDS)})\.(\d+)(?=[./]|$)")

Counts = dict[str, dict[str, int]]  # kind of block -> operator -> number of nodes


def count_nodes(model: ir.Model) -> Counts:
    """Count the nodes of the last block of each kind by operator, without constants; {} for a model without blocks.

    The last block is counted because the first one also holds nodes that all blocks share. Accepts a model as traced,
    whose nodes name their module in their metadata, and a model whose nodes are named after their module.
    """
    found: dict[str, dict[int, Counter[str]]] = {}
    for node in model.graph:
        block = _BLOCK.match(module_path(node) or node.name or "")
        if block is None or node.op_type == "Constant":
            continue
        of_a_weight = len(node.inputs) == 1 and node.inputs[0] is not None and node.inputs[0].is_initializer()
        op = node.op_type + (OF_A_WEIGHT if of_a_weight else "")
        found.setdefault(KINDS[block[1]], {}).setdefault(int(block[2]), Counter())[op] += 1
    return {kind: dict(sorted(blocks[max(blocks)].items())) for kind, blocks in found.items()}


def summary(before: Counts, after: Counts) -> str:
    """Describe the number of nodes per block before and after the passes; "" for a model without blocks."""
    return ", ".join(
        f"{kind} block {sum(before.get(kind, {}).values())} -> {sum(ops.values())} nodes" for kind, ops in after.items()
    )


def table(before: Counts, after: Counts) -> str:
    """Format two counts side by side, with one line per operator under each kind of block."""
    lines = []
    for kind, ops in after.items():
        traced = before.get(kind, {})
        lines.append(f"{kind:<28} {sum(traced.values()):>5} -> {sum(ops.values()):>4}")
        lines += [f"  {op:<26} {traced.get(op, 0):>5} -> {ops.get(op, 0):>4}" for op in sorted({*traced, *ops})]
    return "\n".join(lines)
