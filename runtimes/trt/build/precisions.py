"""The precision in which each layer of a plan runs, from the engine inspector; reveals silent fallbacks.

The inspector lists fused layers, each with its ONNX nodes and the types of its inputs. The precision of a product is
the narrowest input type of its layer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

# narrowest first; the inspector writes "FP8" or, for linear layouts, "Row major linear FP8 format"
WORDS: tuple[tuple[str, str], ...] = (
    ("fp4", r"FP4|E2M1"),
    ("int4", r"Int4\b"),
    ("fp8", r"FP8|E4M3"),
    ("int8", r"Int8\b|INT8"),
    ("bf16", r"BFloat16|BF16"),
    ("fp16", r"Half|FP16"),
    ("fp32", r"Float\b|FP32"),
)
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
PRODUCTS = ("MatMul", "Gemm", "Conv")
UNKNOWN = "unknown"


def summarize(information: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Count layers and the graph's products by precision.

    `model` is the ONNX ModelProto. `quantized` counts the products of two dequantized values, and how many of them run
    in 8 bits or fewer; `missed` names up to ten that do not.
    """
    layers = [layer for layer in information.get("Layers", []) if isinstance(layer, dict)]
    where = {node: _precision(layer) for layer in layers for node in _nodes(layer)}
    products = [node for node in model.graph.node if node.op_type in PRODUCTS]
    asked = _quantized(model)
    narrow = [name for name in asked if where.get(name, UNKNOWN) in ("fp8", "int8", "fp4", "int4")]
    missed = [name for name in asked if name not in narrow]
    return {
        "layers": len(information.get("Layers", [])),
        "by_precision": dict(Counter(_precision(layer) for layer in layers)),
        "products": dict(Counter(where.get(node.name, UNKNOWN) for node in products)),
        "quantized": {"asked": len(asked), "run": len(narrow), "share": len(narrow) / len(asked) if asked else None},
        "missed": missed[:10],
        "reformats": sum("reformat" in str(layer.get("LayerType", "")).lower() for layer in layers),
    }


def _quantized(model: Any) -> list[str]:
    """Return the names of products with two dequantized operands."""
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in PRODUCTS and len(node.input) > 1 and {node.input[0], node.input[1]} <= dequantized
    ]


def _nodes(layer: Mapping[str, Any]) -> Iterator[str]:
    """Yield the ONNX nodes of a layer; a fused layer joins their names with ASCII 30."""
    for name in NODE.findall(str(layer.get("Metadata", ""))):
        yield from name.split("\x1e")


def _precision(layer: Mapping[str, Any]) -> str:
    read = " ".join(str(tensor.get("Format/Datatype", "")) for tensor in layer.get("Inputs", []))
    return next((name for name, words in WORDS if re.search(words, read)), UNKNOWN)
