"""Name nodes after their module in the model, so that profiles and lint messages are readable."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

from export.parts import MODULE

SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes(model: ir.Model) -> bool:
    """Name each node "<module path>/<operator>", numbered if not unique, and name its outputs after it.

    Graph outputs keep their names.
    """
    count: Counter[str] = Counter()
    for node in model.graph:
        name = f"{module_path(node) or 'graph'}/{node.op_type}"
        count[name] += 1
        node.name = name if count[name] == 1 else f"{name}_{count[name]}"
        for i, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = f"{node.name}:{i}"
    return bool(count)


def module_path(node: ir.Node) -> str:
    """Return the path of the module that a node belongs to; "" means the whole graph.

    The path comes from the scopes in the metadata of torch's exporter. A node without scopes, created by a rewrite,
    belongs to the module of its first computed input.
    """
    while SCOPES not in node.metadata_props:
        producers = [value.producer() for value in node.inputs if value is not None]
        maker = next((producer for producer in producers if producer is not None), None)
        if maker is None:
            return ""
        node = maker
    scopes = ast.literal_eval(node.metadata_props[SCOPES])
    paths = [scope for scope in scopes[:-1] if scope and not scope.startswith("_")]  # "_..." is internal to torch
    return paths[-1].removeprefix(MODULE) if paths else ""
