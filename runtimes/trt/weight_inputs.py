"""Weights as inputs of a plan: one plan per graph, sizes and GPU, whatever the values of its weights.

Every stored tensor of a graph becomes an input of the network, bound at run time to device memory that is filled once
from the safetensors of the artifact. What stays in the plan are scales of QuantizeLinear and DequantizeLinear, which
TensorRT wants as constants, and constants of the exporter. A plan is as small as its kernels, a build reads no weights,
and a fine-tune, a merged adapter or another quantization with equal scales is loaded into a running plan by a copy.

A weight [N, K] that the graph transposes is an input [K, N] and is transposed once, when it is loaded: TensorRT for RTX
(1.7) fuses residual and gate into such a product of bf16 as it does with a constant, and does not if the graph
transposes an input (klein-4b at one megapixel on an L4, by roofline: 346 and 388 ms a step).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kit.errors import ArtifactError

SUFFIX = ".weights.json"  # of the list beside a plan
PRINT_BYTES = 4096  # of a weight that its digest covers
QUANTIZING = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class WeightInput:
    """One weight that is an input of a network: where its bytes are, and their form."""

    name: str  # of the input and of the tensor in the graph
    file: str  # safetensors file beside the plan
    offset: int  # in the file
    nbytes: int
    type: int  # ONNX TensorProto data type
    shape: tuple[int, ...]  # as stored
    transposed: bool  # the input has the reverse shape
    digest: str  # of shape, type and first bytes


@dataclass(frozen=True)
class WeightList:
    """The weights of one plan, and a digest of what the plan itself contains of its graph."""

    weights: tuple[WeightInput, ...]
    constants: str

    def write(self, path: Path) -> None:
        """Write the list as JSON."""
        raw = {"constants": self.constants, "weights": [asdict(weight) for weight in self.weights]}
        path.write_text(json.dumps(raw, indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> WeightList:
        """Read what `write` wrote; raises ArtifactError that names the file."""
        try:
            raw = json.loads(path.read_text())
            weights = tuple(WeightInput(**{**one, "shape": tuple(one["shape"])}) for one in raw["weights"])
            return cls(weights, str(raw["constants"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}: not a list of weights ({error}); build the engine again") from None

    def difference(self, other: WeightList) -> str | None:
        """Return why the weights of `other` cannot be loaded in place of these, None if they can."""
        mine, theirs = ({w.name: (w.type, w.shape, w.transposed) for w in one.weights} for one in (self, other))
        if missing := mine.keys() - theirs.keys():
            return f"it has no weight {min(missing)}"
        if extra := theirs.keys() - mine.keys():
            return f"the plan has no weight {min(extra)}"
        if different := [name for name, form in mine.items() if theirs[name] != form]:
            return f"{different[0]} has another shape or type"
        if self.constants != other.constants:
            return "its quantization scales differ from those in the plan; build an engine from it"
        return None


def take_weights(model: Any, ranges: dict[str, tuple[str, int, int]], read: Any) -> WeightList:
    """Turn stored initializers of an ONNX ModelProto into inputs, in place; returns them.

    `ranges` gives file, offset and length of each stored initializer and loses those that became inputs; `read` returns
    the first n bytes of one.
    """
    from onnx import helper

    graph = model.graph
    scales = _scales(graph)
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    found: list[WeightInput] = []
    kept, dead = [], []
    renamed: dict[str, str] = {}  # results of removed transposes
    for tensor in graph.initializer:
        if tensor.name not in ranges or tensor.name in scales:
            kept.append(tensor)
            continue
        shape = tuple(int(size) for size in tensor.dims)
        readers = users.get(tensor.name, [])
        transposed = len(shape) == 2 and bool(readers) and all(_is_transpose(node) for node in readers)
        if transposed:
            dead += [id(node) for node in readers]
            renamed |= {node.output[0]: tensor.name for node in readers}
        file, offset, nbytes = ranges.pop(tensor.name)
        head = f"{list(shape)}{tensor.data_type}".encode() + read(file, offset, min(nbytes, PRINT_BYTES))
        digest = hashlib.sha256(head).hexdigest()[:16]
        found.append(WeightInput(tensor.name, file, offset, nbytes, tensor.data_type, shape, transposed, digest))
        dims = list(reversed(shape)) if transposed else list(shape)
        graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, dims))
    nodes = [node for node in graph.node if id(node) not in set(dead)]
    for node in nodes:
        for place, name in enumerate(node.input):
            if name in renamed:
                node.input[place] = renamed[name]
    _replace(graph.node, nodes)
    _replace(graph.initializer, kept)
    return WeightList(tuple(found), _constants(graph, ranges, read))


def _replace(field: Any, items: Sequence[Any]) -> None:
    """Replace the items of a repeated field of a message by some of them."""
    copies = [type(item)() for item in items]
    for copy, item in zip(copies, items, strict=True):
        copy.CopyFrom(item)
    del field[:]
    field.extend(copies)


def _is_transpose(node: Any) -> bool:
    return node.op_type == "Transpose" and [list(a.ints) for a in node.attribute if a.name == "perm"] == [[1, 0]]


def _scales(graph: Any) -> set[str]:
    """Return the names of initializers that are scales or zero points, also through a Cast."""
    cast = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Cast"}
    names = {name for node in graph.node if node.op_type in QUANTIZING for name in node.input[1:]}
    return names | {cast[name] for name in names if name in cast}


def _constants(graph: Any, ranges: dict[str, tuple[str, int, int]], read: Any) -> str:
    """Digest the initializers that stay in a plan."""
    whole = hashlib.sha256()
    for tensor in graph.initializer:
        place = ranges.get(tensor.name)
        whole.update(tensor.name.encode())
        whole.update(tensor.SerializeToString() if place is None else read(*place))
    return whole.hexdigest()[:16]


def files_of(weights: Iterable[WeightInput]) -> list[str]:
    """Return the files that weights are in."""
    return sorted({weight.file for weight in weights})
