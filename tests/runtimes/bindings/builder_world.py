"""A TensorRT that builds nothing: the answers that the stand-in gives to the builder, and a graph to build."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from kit.ports import Port, Ports
from runtimes.trt.build import apart
from tests.runtimes.bindings.strict import StrictModule

PORTS = Ports(
    inputs=(Port("x", "bf16", ("batch", "image_tokens", 16)), Port("ids", "i64", ("batch", "image_tokens", 4))),
    outputs=(Port("y", "bf16", ("batch", "image_tokens", 16)),),
)
TYPES = {
    TensorProto.BFLOAT16: "BF16",
    TensorProto.INT64: "INT64",
    TensorProto.FLOAT: "FLOAT",
    TensorProto.UINT8: "UINT8",
    TensorProto.FLOAT8E4M3FN: "FP8",
    TensorProto.INT4: "INT4",
}
STORED = {"codes": (TensorProto.FLOAT8E4M3FN, (16, 16), 256), "small": (TensorProto.INT4, (16, 16), 128),
          "plain": (TensorProto.BFLOAT16, (16, 16), 512)}  # fmt: skip
LAYERS = {
    "Layers": [
        {
            "Name": "first",
            "LayerType": "gemm",
            "Inputs": [{"Format/Datatype": "FP8"}, {"Format/Datatype": "FP8"}],
            "Metadata": "[ONNX Layer: cast][ONNX Layer: eight_bits]",
        },
        {
            "Name": "second",
            "LayerType": "gemm",
            "Inputs": [{"Format/Datatype": "Row major linear BFloat16 format"}],
            "Metadata": "[ONNX Layer: fallen_back\x1eplain_product]",
        },
        {"Name": "move", "LayerType": "Reformat", "Inputs": [{"Format/Datatype": "Float"}], "Metadata": ""},
    ],
    "Bindings": [],
}


def write_graph(folder: Path) -> Path:
    """Write a graph whose weights are byte ranges of one file that is a hard link, in three types; returns its path."""
    source, linked = folder / "elsewhere.bin", folder / "weights.safetensors"
    rng = np.random.default_rng(0)
    source.write_bytes(rng.integers(0, 256, 8 + sum(size for *_, size in STORED.values()), np.uint8).tobytes())
    linked.hardlink_to(source)
    initializers, offset = [], 8
    for name, (kind, shape, size) in STORED.items():
        tensor = TensorProto(name=name, data_type=kind, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, entry in (("location", linked.name), ("offset", offset), ("length", size)):
            tensor.external_data.add(key=key, value=str(entry))
        initializers.append(tensor)
        offset += size
    scale = helper.make_tensor("scale", TensorProto.FLOAT, (), [0.5])

    def value(port: Port) -> Any:
        kind = TensorProto.INT64 if port.dtype == "i64" else TensorProto.BFLOAT16
        return helper.make_tensor_value_info(port.name, kind, [str(d) if isinstance(d, str) else d for d in port.dims])

    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale"], ["dx"], "dequantize"),
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["dw"], "weight"),
        helper.make_node("MatMul", ["dx", "dw"], ["a"], "eight_bits"),
        helper.make_node("MatMul", ["dx", "dw"], ["b"], "fallen_back"),
        helper.make_node("MatMul", ["a", "plain"], ["y"], "plain_product"),
    ]
    inputs, outputs = [value(p) for p in PORTS.inputs], [value(p) for p in PORTS.outputs]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, [*initializers, scale])
    path = folder / "model.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return path


class BuilderWorld:
    """Gives the stand-in a parser that reads, a builder that writes, and an inspector; keeps what it was handed."""

    def __init__(self, trt: StrictModule, plan: bytes = b"a plan") -> None:
        self.trt = trt
        self.plan = plan
        self.model = onnx.ModelProto()
        self.weights: dict[str, bytes] = {}
        self.parses = True
        self.builds = True
        self.stopped_after: int | None = None  # steps that the builder took before it was told to stop
        self.on_step: Any = lambda step: None
        for cls in ("OnnxParser", "OnnxParserRefitter"):
            trt.behave(cls, "load_model_proto", lambda parser, model, path=None: self.load(model))
            trt.behave(cls, "load_initializer", lambda parser, name, data, size: self.take(name, data, size))
        trt.behave("OnnxParser", "parse_model_proto", lambda parser: self.parses)
        trt.behave("OnnxParser", "parse_from_file", lambda parser, model: self.load(Path(model).read_bytes()))
        trt.behave("OnnxParser", "num_errors", lambda parser: 0 if self.parses else 1)
        trt.behave("ParserError", "node_name", lambda error: "some_node")
        trt.behave("ParserError", "desc", lambda error: "no such operator")
        for side in ("input", "output"):
            trt.behave("INetworkDefinition", f"num_{side}s", lambda n, side=side: len(self.values(side)))
            trt.behave("INetworkDefinition", f"get_{side}", lambda n, index, side=side: self.tensor(side, index))
        trt.behave("ITensor", "name", lambda tensor: self.tensors[id(tensor)][0])
        trt.behave("ITensor", "dtype", lambda tensor: self.tensors[id(tensor)][1])
        trt.behave("ITensor", "shape", lambda tensor: self.tensors[id(tensor)][2])
        self.tensors: dict[int, Any] = {}
        self.kept: list[Any] = []
        streams = trt.interface["classes"]["Builder"]["methods"]
        if "build_serialized_network_to_stream" in streams:
            trt.behave("Builder", "build_serialized_network_to_stream", self.stream)
        trt.behave("Builder", "build_serialized_network", self.in_memory)
        trt.behave("ITimingCache", "serialize", lambda cache: self.memory(b"timings"))
        trt.behave("EngineInspector", "get_engine_information", lambda inspector, **_: json.dumps(LAYERS))

    def load(self, model: Any) -> bool:
        self.model = onnx.ModelProto.FromString(bytes(model))
        return True

    def take(self, name: str, data: int, size: int) -> bool:
        self.weights[name] = ctypes.string_at(data, size)
        return True

    def values(self, side: str) -> Any:
        return self.model.graph.input if side == "input" else self.model.graph.output

    def tensor(self, side: str, index: int) -> Any:
        value = self.values(side)[index]
        tensor = self.trt.create("ITensor")
        dims = [d.dim_value if d.HasField("dim_value") else -1 for d in value.type.tensor_type.shape.dim]
        kind = getattr(self.trt.types["DataType"], TYPES[value.type.tensor_type.elem_type])
        self.tensors[id(tensor)] = (value.name, kind, tuple(dims))
        self.kept.append(tensor)
        return tensor

    def memory(self, content: bytes) -> Any:
        cls: Any = self.trt.types["IHostMemory"]
        return cls.__new__(cls, content)

    def run(self, config: Any) -> bool:
        """Report two nested phases to the monitor, as TensorRT does, until it says stop."""
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 2)
        monitor.phase_start("Timing", "Building", 4)
        for step in range(4):
            self.on_step(step)
            if not monitor.step_complete("Timing", step):
                self.stopped_after = step
                return False
        monitor.phase_finish("Timing")
        for step in range(2):
            monitor.step_complete("Building", step)
        monitor.phase_finish("Building")
        return self.builds

    def stream(self, builder: Any, network: Any, config: Any, writer: Any) -> bool:
        if not self.run(config):
            return False
        half = len(self.plan) // 2
        return all(writer.write(part) == len(part) for part in (self.plan[:half], self.plan[half:]))

    def in_memory(self, builder: Any, network: Any, config: Any, **_: Any) -> Any:
        return self.memory(self.plan) if self.run(config) else None


def run_here(
    works: Sequence[apart.Work],
    workers: int,
    tick: Callable[[int, float, str], None],
    done: Callable[[int, Any], None],
) -> None:
    """Do in this process what `apart.run` does in children."""
    assert workers == 1, "TensorRT times kernels: one build at a time"
    for place, work in enumerate(works):
        done(place, work.function(*work.arguments, partial(tick, place)))
