"""Parse a graph into a TensorRT network, with weights by address, and check it against its ports."""

from __future__ import annotations

from collections.abc import Set

import tensorrt as trt

from kit.dtypes import number_format
from kit.errors import ArtifactError
from kit.ports import Port, Ports
from runtimes.trt.external_weights import ExternalWeights, complaints


def parse(
    builder: trt.Builder, logger: trt.ILogger, weights: ExternalWeights
) -> tuple[trt.INetworkDefinition, trt.OnnxParser]:
    """Parse a graph into a strongly typed network; keep parser and `weights` alive until it is built.

    TensorRT 11 is always strongly typed and ignores the flag; 10 needs it. Raises ArtifactError with the nodes that the
    parser rejects.
    """
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if hasattr(parser, "load_model_proto"):
        weights.feed(parser)
        parsed = parser.parse_model_proto()
    else:  # an older parser reads and copies the files itself
        parsed = parser.parse_from_file(str(weights.path))
    if not parsed:
        raise ArtifactError(f"{weights.path}: TensorRT cannot parse the graph: {complaints(parser)}")
    return network, parser


def check_ports(network: trt.INetworkDefinition, ports: Ports, weights: Set[str] = frozenset()) -> None:
    """Compare the inputs and outputs of a network with its ports; raises ArtifactError with the difference.

    `weights` names further inputs.
    """
    for side, wanted, count in (
        ("input", ports.inputs, network.num_inputs),
        ("output", ports.outputs, network.num_outputs),
    ):
        get = network.get_input if side == "input" else network.get_output
        tensors = [get(index) for index in range(count)]
        found = {tensor.name: tensor for tensor in tensors if side == "output" or tensor.name not in weights}
        if set(found) != {port.name for port in wanted}:
            raise ArtifactError(
                f"the network has {side}s {', '.join(sorted(found))}; its ports are "
                f"{', '.join(sorted(port.name for port in wanted))}"
            )
        for port in wanted:
            _check_port(found[port.name], port, side)


def _check_port(tensor: trt.ITensor, port: Port, side: str) -> None:
    shape, found = tuple(tensor.shape), tensor.dtype
    if found.name != number_format(port.dtype).tensorrt:
        raise ArtifactError(f"{side} {port.name} is {found.name} in the network, {port.dtype} in its port")
    fixed = [(i, size) for i, size in enumerate(port.dims) if isinstance(size, int)]
    if len(shape) != len(port.dims) or any(shape[i] not in (size, -1) for i, size in fixed):
        raise ArtifactError(f"{side} {port.name} has shape {list(shape)} in the network, {list(port.dims)} in its port")
