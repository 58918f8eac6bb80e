"""Artifacts whose graphs have the true shapes of a variant and next to no work: to time all that is not the model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from kit.artifact import Manifest, PartRecord, step_versions, write_manifest
from kit.ports import SERVED_PARTS, PartName, Port, ports
from kit.variants import Variant

OPSET = 23
TYPES: Mapping[str, int] = {"fp32": TensorProto.FLOAT, "i64": TensorProto.INT64, "u8": TensorProto.UINT8}
Nodes = tuple[list[Any], Mapping[str, Any]]  # nodes, and initializers by name


def write_stand_in(variant: Variant, tokenizer: Path, out: Path) -> Manifest:
    """Write an fp32 artifact of a variant to the empty folder `out`; `tokenizer` is any tokenizer's folder."""
    parts: dict[PartName, PartRecord] = {}
    for part in SERVED_PARTS:
        described = ports(part, variant, "fp32")
        nodes, constants = _nodes(part, variant)
        graph = helper.make_graph(
            nodes,
            part,
            [_value(port) for port in described.inputs],
            [_value(port) for port in described.outputs],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11)
        (out / part).mkdir(parents=True)
        onnx.save(model, out / part / "model.onnx")
        parts[part] = PartRecord(f"{part}/model.onnx", described)
    shutil.copytree(tokenizer, out / "tokenizer")
    return write_manifest(
        out,
        Manifest(
            kind="onnx",
            variant=variant,
            compute="fp32",
            recipe="fp32",
            options={},
            source={"stand-in": variant.name},
            parts=parts,
            versions=step_versions("stand-in", 1, "onnx"),
        ),
    )


def _nodes(part: PartName, variant: Variant) -> Nodes:
    """Return nodes that make outputs of the right shapes from the inputs, in about a pass through memory."""
    node = helper.make_node
    if part == "text_encoder":  # [B, T] -> [B, T, 3H]
        wide = np.zeros((1, 1, variant.transformer.joint_dim), np.float32)
        return [
            node("Cast", ["input_ids"], ["ids"], to=TensorProto.FLOAT),
            node("Unsqueeze", ["ids", "last"], ["columns"]),
            node("Mul", ["columns", "wide"], ["prompt_embeds"]),
        ], {"last": np.array([2], np.int64), "wide": wide}
    if part == "transformer":  # towards zero
        return [node("Mul", ["hidden_states", "half"], ["velocity"])], {"half": np.array(0.5, np.float32)}
    slices: dict[str, Sequence[int]] = {"from": [0], "to": [3], "axis": [1]}
    constants = {name: np.array(value, np.int64) for name, value in slices.items()}
    floats = {"low": 0, "high": 255, "grey": 128, "spread": 60}
    return [  # [B, 128, h, w] -> [B, 16 h, 16 w, 3]
        node("Slice", ["latents", "from", "to", "axis"], ["colors"]),
        node("Mul", ["colors", "spread"], ["wide"]),
        node("Add", ["wide", "grey"], ["shifted"]),
        node("Clip", ["shifted", "low", "high"], ["bounded"]),
        node("Cast", ["bounded"], ["bytes"], to=TensorProto.UINT8),
        node("Transpose", ["bytes"], ["pixels"], perm=[0, 2, 3, 1]),
        node("Resize", ["pixels", "", "grown"], ["image"], mode="nearest"),
    ], {
        **constants,
        **{name: np.array(value, np.float32) for name, value in floats.items()},
        "grown": np.array([1, 16, 16, 1], np.float32),
    }


def _value(port: Port) -> Any:
    dims = [str(d).replace("*", "x") if isinstance(d, str) else d for d in port.dims]
    return helper.make_tensor_value_info(port.name, TYPES[port.dtype], dims)
