"""Find the linear layers of an exported graph: MatMuls with a weight of the checkpoint, named by module path."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from kit.dtypes import format_of_onnx
from kit.errors import ArtifactError
from kit.safetensors_file import StoredTensor

READABLE = ("fp32", "fp16", "bf16", "fp8", "int8")


@dataclass(frozen=True)
class Linear:
    """One linear layer: y = x W^T, with W [N, K] stored in a file."""

    name: str  # transformer_blocks.0.attn.to_q
    node: ir.Node  # the MatMul
    weight: StoredTensor
    scale: float = 1.0  # multiplies a weight that is stored in FP8

    @property
    def outputs(self) -> int:
        return self.weight.shape[0]

    @property
    def inputs(self) -> int:
        return self.weight.shape[1]

    @property
    def activation(self) -> ir.Value:
        value = self.node.inputs[0]
        assert value is not None
        return value


def find_linears(model: ir.Model, folder: Path) -> Iterator[Linear]:
    """Yield the linear layers of a graph, whose weights are in files of `folder`, in the order of the graph.

    Raises ArtifactError, naming the tensor, for a weight stored in a type that cannot be read.
    """
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[1] is None:
            continue
        transpose = node.inputs[1].producer()
        if transpose is None or transpose.op_type != "Transpose" or transpose.inputs[0] is None:
            continue
        value, scale = transpose.inputs[0], 1.0
        head = value.producer()
        if head is not None and head.op_type == "DequantizeLinear":
            assert head.inputs[1] is not None
            assert head.inputs[1].const_value is not None
            scale = float(np.asarray(head.inputs[1].const_value.numpy()).reshape(()))
        if head is not None and head.op_type in ("Cast", "DequantizeLinear"):
            assert head.inputs[0] is not None
            value = head.inputs[0]
        if isinstance(value.const_value, ir.ExternalTensor) and len(value.const_value.shape) == 2:
            name = (node.name or "").rpartition("/")[0]
            yield Linear(name, node, stored(value.const_value, folder), scale)


def stored(tensor: ir.ExternalTensor, folder: Path) -> StoredTensor:
    """Return the byte range that an external tensor of a graph in `folder` refers to."""
    found = format_of_onnx(tensor.dtype)
    if found is None or found.name not in READABLE:
        raise ArtifactError(f"{folder}: tensor {tensor.name!r} is stored as {tensor.dtype}, which cannot be read")
    shape = tuple(int(size) for size in tensor.shape)
    nbytes = math.prod(shape) * tensor.dtype.itemsize
    return StoredTensor(
        tensor.name or "", found.stored, shape, folder / tensor.location, tensor.offset or 0, int(nbytes)
    )
