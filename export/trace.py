"""Trace a torch module to an ONNX graph without weights, using fake tensors."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import version_converter
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.onnx._internal.exporter._core import _exported_program_to_onnx_program
from torch.onnx._internal.exporter._registration import ONNXRegistry

from export.graphs.attention import Attention
from export.graphs.constants import read_constant
from export.parts import MODULE, PARTS
from kit.dtypes import Compute, torch_type
from kit.ports import PartName, Ports, ports, split_axis
from kit.variants import Variant

OPSET = 23  # BF16 Conv, fp32 scales in QuantizeLinear, Attention; read by TensorRT 10.15 to 11 and ONNX Runtime
# Example sizes: all different and none equal to 1, so that no axis is merged with another or treated as a constant.
EXAMPLE = {"batch": 2, "image_tokens": 24, "ref_tokens": 20, "latent_height": 4, "latent_width": 6}


class FakePart:
    """One part as a module of fake tensors, which have names, shapes and types but no memory."""

    def __init__(self, part: PartName, variant: Variant, compute: Compute, attention: Attention) -> None:
        self.part = part
        self.ports: Ports = ports(part, variant, compute)
        self.mode = FakeTensorMode()
        with self.mode, _default_dtype(torch_type(compute)):
            self.module: nn.Module = PARTS[part].build(variant, attention).eval()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all weights that a checkpoint must provide, by name."""
        state = self.module.state_dict()
        return {
            name.removeprefix(MODULE): tuple(tensor.shape)
            for name, tensor in state.items()
            if not name.endswith("num_batches_tracked")
        }

    def trace(self) -> ir.Model:
        """Trace the module with symbolic sizes and translate it; initializers have names and shapes but no values."""
        axes: dict[str, Any] = {}
        with self.mode, torch.no_grad(), _quiet():
            example = {
                port.name: torch.zeros(port.shape(EXAMPLE), dtype=torch_type(port.dtype)) for port in self.ports.inputs
            }
            dynamic = {
                port.name: {i: _axis(word, axes) for i, word in enumerate(port.dims) if isinstance(word, str)}
                for port in self.ports.inputs
            }
            program = torch.export.export(
                self.module,
                (),
                kwargs=_by_parameter(self.module, example),
                dynamic_shapes=_by_parameter(self.module, dynamic),
                strict=False,
            )
            model = translate(program)
        for name, value in model.graph.initializers.items():
            value.const_value = None
            if not name.startswith(MODULE):
                value.const_value = ir.tensor(read_constant(self.module, name), name=name)
        values = (*model.graph.inputs, *model.graph.outputs)
        for value, port in zip(values, (*self.ports.inputs, *self.ports.outputs), strict=True):
            value.name = port.name
            value.shape = ir.Shape(port.dims)
        model.graph.name = self.part
        return model


def translate(program: torch.export.ExportedProgram) -> ir.Model:
    """Translate an exported program operator by operator.

    torch.onnx.export would first trace the program a second time to decompose composite operators, which takes two
    thirds of its time. The translator already supports the operators of these graph modules, except casts and the
    assertions around them; those are replaced first.
    """
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)
        elif node.target is torch.ops.aten.to.dtype:
            node.target = torch.ops.prims.convert_element_type.default
            node.args, node.kwargs = node.args[:2], {}
    registry = ONNXRegistry.from_torchlib(opset_version=OPSET)
    model: ir.Model = _exported_program_to_onnx_program(program, registry=registry).model
    version_converter.convert_version(model, OPSET)
    assert model.opset_imports[""] == OPSET
    return model


def _by_parameter(module: nn.Module, by_port: dict[str, Any]) -> dict[str, Any]:
    """Map ports to a forward's parameters by name; inputs the signature does not name go into `cache`, in order."""
    parameters = inspect.signature(module.forward).parameters
    named = {name: entry for name, entry in by_port.items() if name in parameters}
    rest = {name: entry for name, entry in by_port.items() if name not in named}
    return named | ({"cache": rest} if rest else {})


def _axis(word: str, axes: dict[str, Any]) -> Any:
    """Return torch's dimension for "width" or "16*width"."""
    factor, name = split_axis(word)
    axis = axes.setdefault(name, Dim(name, min=1))
    return factor * axis if factor > 1 else axis


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence two known messages of torch's exporter: that torchvision is absent, and a deprecation in torch itself."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\).*", FutureWarning)
            yield
    finally:
        registration.setLevel(level)
