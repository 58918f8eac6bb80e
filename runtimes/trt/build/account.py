"""The short account of a plan that its manifest keeps: what runs in which type, what is fused, bytes and roofline.

A product counts as done in the narrowest type that its kernel reads. An ONNX node may appear in the metadata of several
layers; the one that is a product, or an attention kernel, says how the product runs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kit.gpus import Gpu
from runtimes.trt.layer_table import NARROW, UNKNOWN, Layer, block_of, by_block, kernels

PRODUCTS = ("MatMul", "Gemm", "Conv")
_MOVES = ("Cast", "Transpose", "Reshape", "Identity", "Slice", "Concat", "Split", "Expand", "Squeeze", "Unsqueeze")

_BLOCK_NAMES = {"transformer_blocks": "a double block", "single_transformer_blocks": "a single block"}


def account(layers: Sequence[Layer], model: Any, gpu: Gpu, scratch: int | None = None) -> dict[str, Any]:
    """Describe a plan; `model` is the ONNX ModelProto that it was built from, `scratch` its activation bytes.

    `quantized` says how many of the products that read two dequantized values run in 8 bits or fewer; `missed` names
    those that do not, up to ten. `attention` says how many softmax nodes of blocks run inside one attention kernel, and
    names up to ten that do not.
    """
    nodes = {node.name: node for node in model.graph.node}
    ran = _where(layers)
    products = [name for name, node in nodes.items() if node.op_type in PRODUCTS]
    asked = _quantized(model)
    missed = [name for name in asked if name not in ran or ran[name].reads not in NARROW]
    # The VAE's attention, one head of 384 or 512 channels, has a fused kernel in no TensorRT and is left out.
    softmax = [name for name, node in nodes.items() if node.op_type in ("Softmax", "Attention") and block_of(name)]
    fused = [layer for layer in layers if layer.is_attention]
    inside = set(_names(fused))
    unfused = [name for name in softmax if name not in inside]
    blocks = by_block(layers, gpu)
    return {
        "layers": sum(1 for _ in kernels(layers)),
        "by_precision": dict(Counter(layer.reads for layer in kernels(layers))),
        "products": dict(Counter(ran[name].reads if name in ran else UNKNOWN for name in products)),
        "product_outputs": dict(Counter(f"{layer.reads}>{layer.writes}" for layer in layers if layer.is_product)),
        "quantized": {
            "asked": len(asked),
            "run": len(asked) - len(missed),
            "share": 1 - len(missed) / len(asked) if asked else None,
        },
        "missed": missed[:10],
        "attention": {
            "asked": len(softmax),
            "fused": len(softmax) - len(unfused),
            "unfused": unfused[:10],
            "types": dict(Counter(f"{','.join(t.type for t in layer.inputs)}>{layer.writes}" for layer in fused)),
        },
        "moves": sum(_only_moves(layer, nodes) for layer in kernels(layers)),
        "reformats": sum("reformat" in layer.kind.lower() for layer in layers),
        "bytes": _known(sum(layer.moved() for layer in kernels(layers))),
        "scratch": scratch,
        "roofline": {
            "gpu": gpu.name,
            "seconds": _known(sum(layer.seconds(gpu) for layer in layers)),
            "blocks": {name: {"kernels": b.kernels, "bytes": _known(b.bytes), "seconds": _known(b.seconds)}
                       for name, b in _kinds(blocks).items()},
        },
    }  # fmt: skip


def _known(value: float) -> float | None:
    """Return a sum, None where sizes that it needs are dynamic."""
    return None if math.isnan(value) else value


def _kinds(blocks: Mapping[str, Any]) -> dict[str, Any]:
    """Keep one block of each kind: the second where there is one, since a first block may do work for all."""
    kept: dict[str, Any] = {}
    for name in sorted(blocks, key=lambda word: (word.rpartition(".")[0], int(word.rpartition(".")[2] or 0))):
        kind = name.rpartition(".")[0]
        if kind and name.rpartition(".")[2] in ("0", "1"):
            kept[kind] = blocks[name]
    return kept


def _where(layers: Iterable[Layer]) -> dict[str, Layer]:
    """Return the layer in which each ONNX node does its work."""
    found: dict[str, Layer] = {}
    for layer in layers:
        for node in layer.nodes:
            before = found.get(node)
            if before is None or _weight(layer) > _weight(before):
                found[node] = layer
    return found


def _weight(layer: Layer) -> int:
    return 2 if layer.is_product else 1 if layer.is_attention else 0


def _names(layers: Iterable[Layer]) -> Iterable[str]:
    return (name for layer in layers for name in layer.nodes)


def _quantized(model: Any) -> list[str]:
    """Name the products whose both operands come out of a DequantizeLinear."""
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in PRODUCTS and len(node.input) > 1 and {node.input[0], node.input[1]} <= dequantized
    ]


def _only_moves(layer: Layer, nodes: Mapping[str, Any]) -> bool:
    """Return whether a kernel computes nothing: a cast or a copy that was not fused into its neighbours."""
    own = [nodes[name].op_type for name in layer.nodes if name in nodes]
    return bool(own) and all(kind in _MOVES for kind in own) and any(t.bytes > 1 << 16 for t in layer.outputs)


def sentence(told: Mapping[str, Any]) -> str:
    """Put an account into one line: "96 of 100 products FP8, attention fused BF16, 9.35 ms a single block on l4"."""
    parts = []
    quantized = told["quantized"]
    if quantized["asked"]:
        narrow = {name: count for name, count in told["products"].items() if name in NARROW}
        words = "/".join(name.upper() for name in narrow) or "8 bits"
        parts.append(f"{quantized['run']} of {quantized['asked']} quantized products in {words}")
    else:
        parts.append(", ".join(f"{count} products in {name.upper()}" for name, count in told["products"].items()))
    attention = told["attention"]
    if attention["asked"]:
        types = "/".join(sorted({text.split(",")[0].upper() for text in attention["types"]})) or "not"
        parts.append(f"attention fused {attention['fused']} of {attention['asked']} ({types})")
    for kind, block in told["roofline"]["blocks"].items():
        name = {"transformer_blocks": "a double block", "single_transformer_blocks": "a single block"}.get(
            kind, "a layer"
        )
        if block["seconds"] is not None:
            parts.append(f"{1e3 * block['seconds']:.3g} ms {name}")
    if told["roofline"]["seconds"] is not None:
        parts.append(f"{1e3 * told['roofline']['seconds']:.3g} ms by roofline on {told['roofline']['gpu']}")
    return ", ".join(parts)
