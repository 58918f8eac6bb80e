"""Name nodes by where they stand in the model, so that a profile or a lint message can be read."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

from export.parts import MODULE

SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(model: ir.Model) -> bool:
    """Name each node "<module path>/<operator>", numbered where that is not unique, and its outputs after it.

    The module path comes from the scopes that torch's exporter leaves in the node's metadata. Graph outputs keep their
    names.
    """
    count: Counter[str] = Counter()
    for node in model.graph:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
        paths = [scope for scope in scopes[:-1] if scope] or ["graph"]
        name = f"{paths[-1].removeprefix(MODULE)}/{node.op_type}"
        count[name] += 1
        node.name = name if count[name] == 1 else f"{name}_{count[name]}"
        for i, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = f"{node.name}:{i}"
    return bool(count)
