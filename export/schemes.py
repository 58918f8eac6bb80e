"""Recognize how the weights of a file are quantized, read FP8 with one scale per tensor, and name everything else.

FP8 files differ in the names of their scales: `weight_scale` (black-forest-labs, ModelOpt, newer ComfyUI),
`scale_weight` beside a marker `scaled_fp8` (older ComfyUI), or none at all (plain casts, whose scale is 1). Scales of
activations are meant for runtimes that multiply in FP8; graphs that compute in a wider type ignore them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.values import read_all
from kit.errors import CheckpointError
from kit.json_object import JsonObject, parse_object, shown
from kit.safetensors_file import StoredTensor

logger = logging.getLogger(__name__)
FP8 = "F8_E4M3"
FP8_WIDE = "F8_E5M2"  # no TensorRT reads it, so it is written as BF16, which holds its values exactly
HEADER_KEY = "_quantization_metadata"
_MARKER = "scaled_fp8"
_WEIGHT_SCALES = ("weight_scale", "scale_weight")
_IGNORED = ("input_scale", "scale_input", "comfy_quant")
_FP8_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_USE = "use the BF16 or FP8 file"
# Other schemes by a part of their keys; the first that matches names the file.
_OTHERS: tuple[tuple[str, str], ...] = (
    (r".*\.weight_scale_2", f"belongs to NVFP4, which cannot be exported; {_USE}"),
    (r".*\.weight_scale_inv", f"is a scale per block of an FP8 weight, which cannot be exported; {_USE}"),
    (
        r".*\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*|SCB|weight_format)",
        f"belongs to bitsandbytes, which cannot be exported; {_USE} and quantize it with `quantize apply`",
    ),
    (
        r".*\.(wscales|wzeros|smooth_factor|smooth_factor_orig|proj_down|proj_up|wcscales|wtscale)",
        f"belongs to Nunchaku (SVDQuant), which cannot be exported; {_USE}",
    ),
    (r".*\.(qweight|qzeros|g_idx)", f"belongs to GPTQ or AWQ, which cannot be exported; {_USE}"),
    (
        r".*(\._weight_(qdata|scale|zero_point)|\.weight:(qdata|scale|zero_point|int_data|tensor_impl.*))",
        f"belongs to torchao, which cannot be exported; {_USE} and quantize it with `quantize apply`",
    ),
    (r".*\.weight\._(data|scale|shift)", f"belongs to Quanto, which cannot be exported; {_USE}"),
)
_METHODS: Mapping[str, str] = {
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "torchao": "torchao",
    "gguf": "GGUF",
    "quanto": "Quanto",
    "gptq": "GPTQ",
    "awq": "AWQ",
}


@dataclass(frozen=True)
class Scale:
    """The number that multiplies the stored values of a tensor, and where it is stored; None if it is 1 by default."""

    value: float
    source: StoredTensor | None = None


Tensors = Mapping[str, StoredTensor]


def check_config(config: JsonObject) -> None:
    """Raise CheckpointError for a config that says that the weights are quantized in a way that cannot be exported."""
    given = config.object("quantization_config")
    if given is None:
        return
    method = str(given.get("quant_method") or given.get("quant_type") or "unknown").lower()
    algorithm = str(given.get("quant_algo") or "").upper()
    if (method == "fp8" and given.get("weight_block_size") is None) or (method == "modelopt" and algorithm == "FP8"):
        return  # FP8 with a scale per tensor: the tensors decide
    name = _METHODS.get(method, shown(given.get("quant_method") or method))
    raise CheckpointError(
        f"{config.where}: quantization_config: the weights are quantized with {name}, which cannot be exported; use "
        "the checkpoint without it, and quantize it with `quantize apply`"
    )


def read_scheme(where: Path, stored: Tensors, headers: Sequence[Mapping[str, str]]) -> tuple[Tensors, dict[str, Scale]]:
    """Split the tensors of one part into weights and the scales of those stored in FP8, by the weight's name.

    Raises CheckpointError that names the scheme and the tensor for weights quantized in another way.
    """
    for name, tensor in stored.items():
        for pattern, sentence in _OTHERS:
            if re.fullmatch(pattern, name):
                raise CheckpointError(f"{where}: {tensor.key!r} {sentence}")
    _check_formats(where, stored, headers)
    eights = {name for name, tensor in stored.items() if tensor.dtype in (FP8, FP8_WIDE)} - {_MARKER}
    eights = {name for name in eights if name.rpartition(".")[2] not in (*_WEIGHT_SCALES, *_IGNORED)}
    modules = {name.rpartition(".")[0] for name in eights}
    _check_integers(where, stored)
    scales: dict[str, Scale] = {}
    used = {_MARKER} if _MARKER in stored else set()
    for module in modules:
        used |= {f"{module}.{word}" for word in (*_WEIGHT_SCALES, *_IGNORED)} & set(stored)
    for name in sorted(eights):
        module = name.rpartition(".")[0]
        found = [stored[key] for key in (f"{module}.{word}" for word in _WEIGHT_SCALES) if key in stored]
        if len(found) > 1:
            raise CheckpointError(f"{where}: {found[0].key!r} and {found[1].key!r} are scales of the same tensor")
        if found:
            scales[name] = Scale(_number(where, found[0]), found[0])
    if bare := sorted(eights - set(scales)):
        if scales or _MARKER in stored or any(name.endswith(".comfy_quant") for name in stored):
            raise CheckpointError(
                f"{where}: tensor {stored[bare[0]].key!r} is stored as {stored[bare[0]].dtype} without a weight_scale"
            )
        logger.warning("%s: %d FP8 tensors have no scales and are read as plain numbers (scale 1)", where, len(bare))
        scales = dict.fromkeys(bare, Scale(1.0))
    return {name: tensor for name, tensor in stored.items() if name not in used}, scales


def _check_formats(where: Path, stored: Tensors, headers: Sequence[Mapping[str, str]]) -> None:
    """Check the formats that a file declares: one marker per layer, or a list in the header."""
    declared: dict[str, object] = {}
    for metadata in (header for header in headers if HEADER_KEY in header):
        layers = parse_object(metadata[HEADER_KEY], f"{where}: {HEADER_KEY}").object("layers")
        for name, entry in (layers.values if layers else {}).items():
            declared[f"{where}: {HEADER_KEY}: {name!r}"] = entry.get("format") if isinstance(entry, dict) else entry
    for name, tensor in stored.items():
        if name.endswith("comfy_quant"):
            declared[f"{where}: {tensor.key!r}"] = _marker(where, tensor).get("format")
    for place, found in declared.items():
        if found not in _FP8_FORMATS:
            title = {"nvfp4": "NVFP4", "int8_tensorwise": "int8 tensor-wise"}.get(str(found), shown(found))
            raise CheckpointError(f"{place} is stored in {title}, which cannot be exported; {_USE}")


def _marker(where: Path, tensor: StoredTensor) -> JsonObject:
    """Read a marker of ComfyUI: JSON as bytes."""
    if tensor.dtype != "U8" or tensor.nbytes > 4096:
        raise CheckpointError(f"{where}: {tensor.key!r} is not a marker of ComfyUI ({tensor.dtype})")
    raw = read_all(tensor).astype("uint8").tobytes()
    return parse_object(raw.decode("utf-8", "replace"), f"{where}: {tensor.key!r}")


def _check_integers(where: Path, stored: Tensors) -> None:
    """Name the schemes that store weights as integers."""
    for name, tensor in stored.items():
        module, _, word = name.rpartition(".")
        if word != "weight" or tensor.dtype not in ("I8", "U8"):
            continue
        scaled = any(f"{module}.{scale}" in stored for scale in _WEIGHT_SCALES)
        if tensor.dtype == "I8":
            what = "int8 tensor-wise" if scaled else "int8"
        else:
            what = "NVFP4 or another format of packed 4-bit numbers"
        raise CheckpointError(f"{where}: {tensor.key!r} is stored in {what}, which cannot be exported; {_USE}")


def _number(where: Path, tensor: StoredTensor) -> float:
    """Read the scale of a tensor."""
    if math.prod(tensor.shape) != 1 or tensor.dtype not in ("F32", "BF16", "F16", "F64"):
        kind = " (MXFP8)" if tensor.dtype == "U8" else ""
        raise CheckpointError(
            f"{where}: {tensor.key!r} is {tensor.dtype} of shape {list(tensor.shape)}{kind}; only FP8 with one scale "
            "per tensor can be exported, so use the BF16 file"
        )
    if not 0 < (value := float(read_all(tensor).reshape(()))) < math.inf:
        raise CheckpointError(f"{where}: {tensor.key!r} is {value}; a scale must be positive and finite")
    return value
