"""The table of layers that a compiler made of a graph: kernels, the types they read and write, bytes, roofline.

TensorRT's engine inspector and the build log of TensorRT for RTX describe the same table. 10.x writes the type of a
tensor as `Format/Datatype`, 11.x and RTX as `Datatype`. The log truncates nothing and needs no GPU.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kit.errors import ArtifactError
from kit.gpus import Gpu
from kit.recipes import Precision

LAUNCH_SECONDS = 3e-6  # of a kernel
SYNCHRONIZATION = ("signal", "wait", "shape_call")  # layers that are no kernels
# The words for a type, narrowest first: the inspector of 10.x writes "Row major linear FP8 format".
TYPES: tuple[tuple[str, float, str], ...] = (
    ("fp4", 0.5, r"FP4|E2M1"),
    ("int4", 0.5, r"Int4\b|INT4"),
    ("fp8", 1, r"FP8|Fp8|E4M3"),
    ("int8", 1, r"\bInt8\b|INT8"),
    ("u8", 1, r"UInt8|UINT8"),
    ("bool", 1, r"Bool"),
    ("bf16", 2, r"BFloat16|BF16"),
    ("fp16", 2, r"Half|FP16"),
    ("i64", 8, r"Int64|INT64"),
    ("i32", 4, r"Int32|INT32"),
    ("fp32", 4, r"Float\b|FP32"),
)
BYTES: Mapping[str, float] = {name: size for name, size, _ in TYPES}
NARROW = ("fp4", "int4", "fp8", "int8")
UNKNOWN = "unknown"
SUFFIX = ".layers.json"  # of the file beside a plan
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([-\d,]*)\], .*?Datatype: ([\w ]+?), Format: (.*?)\}")
_LAYER = re.compile(
    r"^Name: (.*?), LayerType: (\w+), Inputs: \[(.*?)\], Constants: \[(.*?)\], Outputs: \[(.*?)\], TacticName: (.*)$"
)
_NODES = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_BLOCK = re.compile(r"(?:single_)?transformer_blocks\.\d+|layers\.\d+")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a layer."""

    name: str
    dims: tuple[int, ...]
    type: str  # the kit's word, UNKNOWN where the compiler's is not known

    @property
    def bytes(self) -> float:
        """Its size; NaN where a dimension is dynamic, which a table writes as -1."""
        return math.nan if -1 in self.dims else math.prod(self.dims) * BYTES.get(self.type, 4)


@dataclass(frozen=True)
class Layer:
    """One kernel, or one step without a kernel."""

    name: str
    kind: str  # the compiler's word: gemm, kgen, runtime_fusion, ...
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]  # of the ONNX graph

    @property
    def is_attention(self) -> bool:
        return "mha" in self.name.lower() or "mha" in self.kind.lower()

    @property
    def is_product(self) -> bool:
        """Whether this is a matrix product or a convolution, what is fused into it included."""
        if self.is_attention:
            return False
        known = self.kind in ("gemm", "correlation", "conv", "fc", "CaskGemm", "CaskConvolution", "runtime_fusion")
        return known or re.match(r"__myl_\w*?Fc", self.name) is not None

    @property
    def reads(self) -> str:
        """The narrowest type among what it reads."""
        found = [tensor.type for tensor in (*self.inputs, *self.constants)]
        return next((name for name, _, _ in TYPES if name in found), UNKNOWN)

    @property
    def writes(self) -> str:
        return self.outputs[0].type if self.outputs else UNKNOWN

    @property
    def block(self) -> str:
        """The block that most of its nodes belong to, "" for a layer outside of blocks."""
        blocks = Counter(block for node in self.nodes if (block := block_of(node)))
        return blocks.most_common(1)[0][0] if blocks else ""

    def flops(self) -> float:
        """Operations of a product or of attention, as far as shapes give them; 0 for everything else."""
        if self.is_attention and len(self.inputs) >= 2:
            q, k = self.inputs[0].dims, self.inputs[1].dims
            if len(q) < 3 or len(k) < 2:
                return 0.0
            keys = k[-1] if k[-2] == q[-1] else k[-2]  # [.., S, D] or [.., D, S]
            return 4.0 * math.prod(q) * keys  # the scores and their product with v
        if not self.is_product or not self.outputs or not self.inputs:
            return 0.0
        weights = [t for t in (*self.constants, *self.inputs) if len(t.dims) >= 2 and t is not self.inputs[0]]
        if not weights:
            return 0.0
        if convolution := next((t for t in weights if len(t.dims) == 4 and t in self.constants), None):
            return 2.0 * math.prod(self.outputs[0].dims) * math.prod(convolution.dims[1:])  # [out, in, kh, kw]
        return max(self._product(activation, weight) for activation in self.inputs for weight in weights)

    def _product(self, activation: Tensor, weight: Tensor) -> float:
        """Operations of activation [.., K] times weight [.., K, N], 0 where the shapes are not those of a product.

        What is fused into a product adds inputs of its own: the residual, the gate.
        """
        if activation is weight or math.prod(weight.dims[:-2]) != 1 or not activation.dims:
            return 0.0
        depth = activation.dims[-1]
        if depth not in weight.dims[-2:]:
            return 0.0
        columns = math.prod(weight.dims) / depth
        rows = math.prod(activation.dims[:-1])
        made = max(math.prod(out.dims) for out in self.outputs)
        return 2.0 * rows * depth * columns if made % (rows * columns) == 0 else 0.0

    def moved(self) -> float:
        """Bytes that pass between this kernel and memory: what it reads, its weights, what it writes."""
        return self.activations() + sum(tensor.bytes for tensor in self.constants)

    def activations(self) -> float:
        """Bytes of what it reads and writes, constants left out."""
        read = sum(tensor.bytes * self._share(tensor) for tensor in self.inputs)
        return read + sum(tensor.bytes for tensor in self.outputs)

    def _share(self, tensor: Tensor) -> float:
        """Return the share of a tensor that is read: a kernel that slices lists the whole tensor.

        It reads as many columns as it writes, less those that come from other inputs, twice for silu(a) * b.
        """
        if self.is_product or self.is_attention or "Slic" not in self.name or len(tensor.dims) < 3:
            return 1.0
        rows, width = math.prod(tensor.dims[:-1]), tensor.dims[-1]
        if not rows or not self.outputs:
            return 1.0
        columns = sum(math.prod(out.dims) / rows for out in self.outputs if math.prod(out.dims) >= rows)
        if not 0 < columns < width:
            return 1.0
        others = [math.prod(other.dims) / rows for other in self.inputs if other.dims != tensor.dims]
        columns -= sum(count for count in others if 1 < count < columns)
        halves = 2 if "Silu" in self.name else 1
        listed = sum(other.dims == tensor.dims for other in self.inputs)
        return min(1.0, halves * columns / width / listed)

    def _math(self) -> Precision:
        """The type that it multiplies in: a narrow one only where both operands have it."""
        types = [tensor.type for tensor in (*self.inputs, *self.constants)]
        for narrow in ("fp8", "int8"):
            if types.count(narrow) >= 2:
                return narrow
        return "fp32" if self.reads in ("fp32", UNKNOWN) else "bf16"

    def seconds(self, gpu: Gpu) -> float:
        """Return the roofline: bytes at the GPU's bandwidth or operations at its rate, whichever takes longer."""
        if self.kind in SYNCHRONIZATION:
            return 0.0
        rate = gpu.dense.get(self._math(), gpu.dense["bf16"])
        return max(self.moved() / gpu.bandwidth, self.flops() / rate) + LAUNCH_SECONDS


def block_of(node: str) -> str:
    """Return the block that a node belongs to by its name, "" for none."""
    match = _BLOCK.search(node)
    return match[0] if match else ""


def type_of(text: str) -> str:
    """Return the kit's word for what a compiler calls a type, UNKNOWN for none that is known."""
    found = [(match.start(), name) for name, _, words in TYPES if (match := re.search(words, text))]
    return found[0][1] if found else UNKNOWN


def from_log(lines: Iterable[str]) -> tuple[Layer, ...]:
    """Read the layers that a build wrote to its log at DETAILED verbosity."""
    found = []
    for block in lines:
        if "LayerType:" not in block:
            continue
        for line in block.split("\n"):  # splitlines() would also split at the ASCII 30 between names of nodes
            if match := _LAYER.match(line):
                name, kind, inputs, constants, outputs, rest = match.groups()
                found.append(Layer(name, kind, _read(inputs), _read(constants), _read(outputs), _names(rest)))
    return tuple(found)


def from_inspector(text: str) -> tuple[Layer, ...]:
    """Read the JSON of an engine inspector, of 10.x, 11.x or RTX."""
    layers = [
        entry if isinstance(entry, dict) else {"Name": entry}  # names alone, without detailed profiling verbosity
        for entry in json.loads(text).get("Layers", [])
    ]
    return tuple(
        Layer(
            str(entry.get("Name", "")),
            str(entry.get("LayerType", "")),
            tuple(_tensor(raw) for raw in entry.get("Inputs", [])),
            tuple(_tensor(raw) for raw in entry.get("Constants", [])),
            tuple(_tensor(raw) for raw in entry.get("Outputs", [])),
            _names(str(entry.get("Metadata", ""))),
        )
        for entry in layers
    )


def write(layers: Sequence[Layer], path: Path) -> None:
    """Write a table as JSON, beside the plan that it describes."""
    path.write_text(json.dumps([asdict(layer) for layer in layers]) + "\n")


def read(path: Path) -> tuple[Layer, ...]:
    """Read what `write` wrote; raises ArtifactError that names the file."""
    try:
        return tuple(_layer(raw) for raw in json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a table of layers ({error}); build the engine again") from None


def _layer(raw: Mapping[str, Any]) -> Layer:
    inputs, constants, outputs = (
        tuple(Tensor(tensor["name"], tuple(tensor["dims"]), tensor["type"]) for tensor in raw[side])
        for side in ("inputs", "constants", "outputs")
    )
    return Layer(raw["name"], raw["kind"], inputs, constants, outputs, tuple(raw["nodes"]))


def _tensor(raw: Mapping[str, Any]) -> Tensor:
    told = str(raw.get("Format/Datatype") or raw.get("Datatype") or "")
    return Tensor(str(raw.get("Name", "")), tuple(int(n) for n in raw.get("Dimensions", ())), type_of(told))


def _read(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(name, tuple(int(n) for n in dims.split(",") if n), type_of(kind))
        for name, dims, kind, _ in _TENSOR.findall(text)
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for group in _NODES.findall(text) for name in group.split("\x1e"))


def kernels(layers: Iterable[Layer]) -> Iterator[Layer]:
    """Yield the layers that are kernels."""
    yield from (layer for layer in layers if layer.kind not in SYNCHRONIZATION)


@dataclass(frozen=True)
class Block:
    """What the kernels of one block add up to."""

    kernels: int
    bytes: float
    seconds: float
    products: Mapping[str, int]  # "fp8>bf16" -> how many
    attention: tuple[str, ...]  # "bf16,bf16,bf16>fp8" of each attention kernel


def by_block(layers: Iterable[Layer], gpu: Gpu) -> dict[str, Block]:
    """Add up the kernels of each block; "" holds those outside of blocks."""
    groups: dict[str, list[Layer]] = defaultdict(list)
    for layer in kernels(layers):
        groups[layer.block].append(layer)
    return {name: _block(members, gpu) for name, members in groups.items()}


def _block(layers: Sequence[Layer], gpu: Gpu) -> Block:
    return Block(
        kernels=len(layers),
        bytes=sum(layer.moved() for layer in layers),
        seconds=sum(layer.seconds(gpu) for layer in layers),
        products=dict(Counter(f"{layer.reads}>{layer.writes}" for layer in layers if layer.is_product)),
        attention=tuple(
            f"{','.join(t.type for t in layer.inputs)}>{layer.writes}" for layer in layers if layer.is_attention
        ),
    )
