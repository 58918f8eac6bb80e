"""Attach weights to a graph: each initializer becomes a byte range of the checkpoint's own files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from export import derived
from export.derived import Derived
from export.parts import MODULE, is_unneeded, source_names
from export.schemes import FP8, FP8_WIDE, Scale
from export.single_file import has_decoder_alone, read_part_folder, read_single_file
from export.tied_heads import restore_embedding
from kit.checkpoint import PART_FOLDERS
from kit.dtypes import onnx_type
from kit.errors import CheckpointError
from kit.ports import PartName
from kit.safetensors_file import StoredTensor
from kit.variants import Variant

PLAIN = ("F32", "F16", "BF16")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Binding:
    """Where the initializers of one part are stored, by their names in the graph module."""

    tensors: Mapping[str, StoredTensor]
    derived: Mapping[str, Derived] = field(default_factory=dict)  # tensors that are not written yet
    scales: Mapping[str, Scale] = field(default_factory=dict)  # of the tensors stored in FP8

    @property
    def files(self) -> list[Path]:
        """Return the files that hold at least one tensor; a shard that holds only unused layers is left out."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def settle(self, folder: Path) -> Binding:
        """Write the derived tensors to a file in `folder` and return a binding that points to it."""
        if not self.derived:
            return self
        taken = {file.name for file in self.files}
        name = derived.FILE if derived.FILE not in taken else f"kit-{derived.FILE}"
        written = derived.write(self.derived.values(), folder / name)
        made = {name: written[tensor.name] for name, tensor in self.derived.items()}
        return Binding({**self.tensors, **made}, {}, self.scales)


def find(
    part: PartName,
    variant: Variant,
    checkpoint: Path,
    shapes: Mapping[str, tuple[int, ...]],
    single_file: Path | None = None,
    weights: str | None = None,
) -> Binding:
    """Find every tensor of a part, given the shapes that the graph module expects.

    `single_file` is read in place of the part's folder; if it holds only the decoder of a VAE, the folder provides the
    rest. `weights` chooses between variants of the files in a folder, such as bf16. Raises CheckpointError, naming the
    tensor as stored and the place, for a tensor that is missing, has the wrong shape or a type that no graph can hold,
    or is unknown. An unknown tensor means that the checkpoint is not the model that its config describes.
    """
    section = PART_FOLDERS[part]
    folder = single_file or checkpoint / section
    if single_file:
        read = read_single_file(section, single_file, variant)
    else:
        read = read_part_folder(section, folder, variant, weights)
    if single_file and section == "vae" and has_decoder_alone(single_file):
        rest = read_part_folder(section, checkpoint / section, variant, weights)
        read = replace(
            read,
            tensors=_without_decoder(rest.tensors) | dict(read.tensors),
            scales=_without_decoder(rest.scales) | dict(read.scales),
        )
    stored = read.tensors
    if part == "text_encoder":
        stored = restore_embedding(stored, checkpoint / section / "config.json")
    names = source_names(part, stored, folder)
    found: dict[str, StoredTensor] = {}
    for name, shape in shapes.items():
        if name not in names:
            label = read.expected.get(name, name)
            raise CheckpointError(f"{folder}: tensor {label!r} of shape {list(shape)} is missing")
        tensor = stored[names[name]]
        if tensor.shape != shape:
            raise CheckpointError(
                f"{folder}: tensor {tensor.key!r} has shape {list(tensor.shape)}, the config asks for {list(shape)}"
            )
        if tensor.dtype not in (*PLAIN, FP8, FP8_WIDE):
            raise CheckpointError(
                f"{folder}: tensor {tensor.key!r} is stored as {tensor.dtype}; a graph can hold {', '.join(PLAIN)}"
            )
        found[name] = tensor
    unknown = [names[name] for name in names if name not in shapes and not is_unneeded(part, name, variant)]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        label = stored[unknown[0]].key
        raise CheckpointError(f"{folder}: tensor {label!r}{more} is not part of the {part}; check the config")
    scales = {name: read.scales[names[name]] for name in found if names[name] in read.scales}
    changed = {name for name, tensor in found.items() if tensor.dtype == FP8_WIDE or names[name] in read.swapped}
    derived = {}
    for name in sorted(changed):
        tensor = found.pop(name)
        scale = scales.pop(name) if tensor.dtype == FP8_WIDE else None
        dtype = "BF16" if scale else tensor.dtype
        derived[name] = Derived(names[name], dtype, tensor, names[name] in read.swapped, scale.value if scale else None)
    return Binding(found, derived, scales)


def _without_decoder(values: Mapping[str, Value]) -> dict[str, Value]:
    return {name: value for name, value in values.items() if not name.startswith(("decoder.", "post_quant_conv."))}


def attach(model: ir.Model, binding: Binding) -> None:
    """Point the initializers of a traced graph to the checkpoint's byte ranges, under the checkpoint's names.

    A tensor stored in a type other than the compute type keeps its stored type and is followed by a Cast, which every
    runtime folds when it loads the graph; no weight is rewritten. A lookup table is not cast as a whole, which would
    double its memory: the looked-up rows are cast instead. A tensor stored in FP8 is followed by a DequantizeLinear
    with its scale.
    """
    graph = model.graph
    for name in [name for name in graph.initializers if name.startswith(MODULE)]:
        traced = graph.initializers[name]
        tensor = binding.tensors[name.removeprefix(MODULE)]
        source = _external(tensor)
        del graph.initializers[name]
        graph.register_initializer(source)
        if stored_scale := binding.scales.get(name.removeprefix(MODULE)):
            label = f"{tensor.name}_scale"
            scale = ir.Value(name=label, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(()))
            scale.const_value = ir.tensor(np.array(stored_scale.value, np.float32), name=label)  # stored in the graph
            graph.register_initializer(scale)
            replacement = _dequantize(graph, source, scale, traced)
        elif traced.dtype != source.dtype and all(_is_lookup(use) for use in traced.uses()):
            for use in list(traced.uses()):
                _cast_rows(graph, use.node, source)
            continue
        else:
            replacement = source if traced.dtype == source.dtype else _cast(graph, source, traced)
        ir.convenience.replace_all_uses_with(traced, replacement)


def _external(tensor: StoredTensor) -> ir.Value:
    """Return an initializer that references a byte range of a file."""
    dtype = onnx_type(tensor.dtype)
    source = ir.Value(name=tensor.name, type=ir.TensorType(dtype), shape=ir.Shape(tensor.shape))
    source.const_value = ir.ExternalTensor(
        location=tensor.file.name,
        offset=tensor.offset,
        length=tensor.nbytes,
        dtype=dtype,
        shape=ir.Shape(tensor.shape),
        name=tensor.name,
        base_dir="",
    )
    return source


def _dequantize(graph: ir.Graph, source: ir.Value, scale: ir.Value, traced: ir.Value) -> ir.Value:
    """Insert a DequantizeLinear from FP8 to the traced type at the start of the graph."""
    assert traced.dtype is not None
    wider = {} if traced.dtype == scale.dtype else {"output_dtype": traced.dtype}
    node = ir.node("DequantizeLinear", inputs=[source, scale], attributes=wider, name=f"{source.name}/DequantizeLinear")
    node.outputs[0].name = f"{source.name}/dequantized"
    node.outputs[0].type = ir.TensorType(traced.dtype)
    node.outputs[0].shape = traced.shape
    graph.insert_before(graph[0], node)
    return node.outputs[0]


def _is_lookup(use: ir.Usage) -> bool:
    return bool(use.node.op_type == "Gather" and use.idx == 0)


def _cast_rows(graph: ir.Graph, lookup: ir.Node, source: ir.Value) -> None:
    """Let a Gather read the stored table and insert a Cast to the traced type after it."""
    rows = lookup.outputs[0]
    assert rows.dtype is not None
    stored = ir.node("Gather", [source, lookup.inputs[1]], dict(lookup.attributes), name=lookup.name)
    stored.outputs[0].name = f"{lookup.name}:stored"
    stored.outputs[0].type, stored.outputs[0].shape = ir.TensorType(source.dtype), rows.shape
    node = ir.node("Cast", [stored.outputs[0]], {"to": rows.dtype}, name=f"{lookup.name}/Cast")
    node.outputs[0].type, node.outputs[0].shape = rows.type, rows.shape
    graph.insert_before(lookup, [stored, node])
    name = rows.name
    ir.convenience.replace_all_uses_with(rows, node.outputs[0])
    graph.remove(lookup, safe=True)
    node.outputs[0].name = name


def _cast(graph: ir.Graph, source: ir.Value, traced: ir.Value) -> ir.Value:
    """Insert a Cast from the stored type to the traced type at the start of the graph."""
    assert traced.dtype is not None
    node = ir.node("Cast", inputs=[source], attributes={"to": traced.dtype}, name=f"{source.name}/Cast")
    node.outputs[0].name = f"{source.name}/as_{traced.dtype.name.lower()}"
    node.outputs[0].type = ir.TensorType(traced.dtype)
    node.outputs[0].shape = traced.shape
    graph.insert_before(graph[0], node)
    return node.outputs[0]
