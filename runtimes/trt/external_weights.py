"""The external initializers of a graph, memory-mapped and passed to TensorRT by address, without a copy.

The initializers of an artifact are byte ranges of safetensors files, which are often hard links. The `onnx` package
rejects external data in hard links, so the files are mapped here, and every range is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kit.errors import ArtifactError
from runtimes.trt.weight_inputs import WeightList, take_weights

Bytes = npt.NDArray[np.uint8]


class ModelReader(Protocol):
    """What TensorRT's parser and refitter have in common."""

    def load_model_proto(self, model: bytes, path: str = ...) -> bool: ...

    def load_initializer(self, name: str, data: int, size: int) -> bool: ...

    def get_error(self, index: int) -> Any: ...

    @property
    def num_errors(self) -> int: ...


class ExternalWeights:
    """A graph and its mapped weights; it must outlive every use of their addresses."""

    def __init__(self, graph: Path) -> None:
        """Read the graph and map its weight files; raises ArtifactError, which names file and tensor."""
        import onnx
        from google.protobuf.message import DecodeError

        self.path = graph
        try:
            self.model = graph.read_bytes()
            self.proto = onnx.ModelProto.FromString(self.model)
        except (OSError, DecodeError) as error:
            raise ArtifactError(f"{graph}: cannot be read as an ONNX graph ({error})") from None
        self.inputs: frozenset[str] = frozenset()  # weights that are inputs of the network
        self._files: dict[str, Bytes] = {}
        self._ranges = {
            tensor.name: self._range(tensor)
            for tensor in self.proto.graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }

    @property
    def files(self) -> list[Path]:
        return sorted(self.path.parent / name for name in self._files)

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, address and number of bytes of every external initializer."""
        for name, (file, offset, length) in self._ranges.items():
            yield name, self._files[file].ctypes.data + offset, length

    def __len__(self) -> int:
        return len(self._ranges)

    def feed(self, reader: ModelReader) -> None:
        """Load the graph and its weights by address into a parser or refitter; raises ArtifactError with its errors."""
        if not reader.load_model_proto(self.model, str(self.path)):
            raise ArtifactError(f"{self.path}: TensorRT cannot load the graph: {complaints(reader)}")
        for name, address, length in self:
            if not reader.load_initializer(name, address, length):
                raise ArtifactError(f"{self.path}: TensorRT rejects the weight {name!r}: {complaints(reader)}")

    def as_inputs(self) -> WeightList:
        """Turn the weights into inputs of the network, which `feed` then leaves out; returns where they are."""
        made = take_weights(self.proto, self._ranges, self.read)
        self.inputs = frozenset(weight.name for weight in made.weights)
        self.model = self.proto.SerializeToString()
        return made

    def read(self, file: str, offset: int, nbytes: int) -> bytes:
        """Return a range of a weight file."""
        return self._files[file][offset : offset + nbytes].tobytes()

    def _range(self, tensor: Any) -> tuple[str, int, int]:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        file, offset, length = entries.get("location", ""), int(entries.get("offset", 0)), int(entries.get("length", 0))
        if Path(file).name != file or not file:
            raise ArtifactError(f"{self.path}: the weight {tensor.name!r} is in {file!r}, outside the folder")
        if file not in self._files:
            path = self.path.parent / file
            if not path.is_file() or not path.stat().st_size:
                raise ArtifactError(f"{path}: missing or empty; it contains the weight {tensor.name!r}")
            self._files[file] = np.memmap(path, np.uint8, mode="r")
        if offset < 0 or length < 0 or offset + length > len(self._files[file]):
            raise ArtifactError(
                f"{self.path.parent / file}: ends at byte {len(self._files[file])}, "
                f"the weight {tensor.name!r} at {offset + length}"
            )
        return file, offset, length


def complaints(reader: ModelReader) -> str:
    """Return the errors of a parser or refitter, each with its node."""
    errors = [reader.get_error(index) for index in range(reader.num_errors)]
    said = [(error.node_name(), error.desc()) for error in errors]
    return "; ".join(f"{node}: {words}".removeprefix(": ") for node, words in said) or "it gives no reason"
