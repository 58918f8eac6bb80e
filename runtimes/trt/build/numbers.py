"""Which of the kit's recipes an artifact counts as: its own, or, of a recipe of the user's, what its graphs hold."""

from __future__ import annotations

from pathlib import Path

from kit.artifact import Manifest
from kit.recipes import RECIPE_NAMES, Recipe, recipe


def recipe_of(artifact: Path, manifest: Manifest) -> Recipe:
    """Return the recipe by whose numbers memory and hardware are judged.

    A recipe of another name (a variation, a file of the user's) is judged by the most demanding numbers in its graphs.
    """
    if manifest.recipe in RECIPE_NAMES:
        return recipe(manifest.recipe)
    import onnx

    kinds: set[int] = set()
    activations = False
    for record in manifest.parts.values():
        graph = onnx.ModelProto.FromString((artifact / record.graph).read_bytes()).graph
        kinds |= {tensor.data_type for tensor in graph.initializer}
        activations = activations or any(node.op_type == "QuantizeLinear" for node in graph.node)
    if onnx.TensorProto.FLOAT8E4M3FN in kinds:
        return recipe("fp8")
    if onnx.TensorProto.INT8 in kinds:
        return recipe("int8" if activations else "int8-weights")
    return recipe("int4-weights" if onnx.TensorProto.INT4 in kinds else manifest.compute)
