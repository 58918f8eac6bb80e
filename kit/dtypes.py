"""Map number formats between libraries in one table, and convert bf16 between numpy and torch.

numpy, torch, onnx_ir and ml_dtypes are imported only by the functions that return their types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import onnx_ir as ir
    import torch

Dtype = Literal["fp32", "bf16", "i64", "u8"]  # of ports
Compute = Literal["fp32", "bf16"]  # of activations in a graph


@dataclass(frozen=True)
class Format:
    """One number format; a name is empty if the library does not have the format or the kit does not use it."""

    name: str  # the kit's
    bits: int
    stored: str = ""  # safetensors
    numpy: str = ""  # numpy, or ml_dtypes if numpy has none
    torch: str = ""
    onnx: str = ""  # onnx_ir.DataType
    triton: str = ""  # config.pbtxt, without TYPE_
    tensorrt: str = ""  # tensorrt.DataType

    @property
    def title(self) -> str:
        """Return the name in documentation, as in TensorRT's operator table: FP32, FP8, INT64."""
        return self.triton or self.name.upper()


FORMATS = (
    Format("fp64", 64, "F64", "float64", "float64", "DOUBLE", "FP64"),
    Format("fp32", 32, "F32", "float32", "float32", "FLOAT", "FP32", "FLOAT"),
    Format("fp16", 16, "F16", "float16", "float16", "FLOAT16", "FP16", "HALF"),
    Format("bf16", 16, "BF16", "bfloat16", "bfloat16", "BFLOAT16", "BF16", "BF16"),
    Format("fp8", 8, "F8_E4M3", "float8_e4m3fn", "float8_e4m3fn", "FLOAT8E4M3FN", tensorrt="FP8"),
    Format("fp8-e5m2", 8, "F8_E5M2", "float8_e5m2", "float8_e5m2", "FLOAT8E5M2"),
    Format("i64", 64, "I64", "int64", "int64", "INT64", "INT64", "INT64"),
    Format("i32", 32, "I32", "int32", "int32", "INT32", "INT32", "INT32"),
    Format("i16", 16, "I16", "int16", "int16", "INT16", "INT16"),
    Format("u64", 64, "U64", "uint64", "uint64", "UINT64"),
    Format("u32", 32, "U32", "uint32", "uint32", "UINT32"),
    Format("u16", 16, "U16", "uint16", "uint16", "UINT16"),
    Format("int8", 8, "I8", "int8", "int8", "INT8", "INT8", "INT8"),
    Format("int4", 4, onnx="INT4", tensorrt="INT4"),
    Format("fp4", 4, onnx="FLOAT4E2M1"),
    Format("u8", 8, "U8", "uint8", "uint8", "UINT8", "UINT8", "UINT8"),
    Format("bool", 8, "BOOL", "bool", "bool", "BOOL", "BOOL", "BOOL"),
)
_BY_WORD: Mapping[str, Format] = {f.name: f for f in FORMATS} | {f.stored: f for f in FORMATS if f.stored}
ITEM_BYTES: Mapping[str, int] = {f.stored: f.bits // 8 for f in FORMATS if f.stored}  # by safetensors' name


def number_format(word: str) -> Format:
    """Return a format by the kit's or safetensors' name."""
    return _BY_WORD[word]


@cache
def numpy_type(word: str) -> Any:
    """Return the numpy dtype of a format, or the ml_dtypes one if numpy has none."""
    import ml_dtypes
    import numpy as np

    name = number_format(word).numpy
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


@cache
def torch_type(word: str) -> torch.dtype:
    """Return torch's dtype of a format."""
    import torch

    dtype: torch.dtype = getattr(torch, number_format(word).torch)
    return dtype


@cache
def onnx_type(word: str) -> ir.DataType:
    """Return onnx_ir's data type of a format."""
    import onnx_ir as ir

    return ir.DataType[number_format(word).onnx]


def format_of_onnx(dtype: ir.DataType | None) -> Format | None:
    """Return the format of a graph's data type, or None if the kit does not use it."""
    return next((f for f in FORMATS if dtype is not None and f.onnx == dtype.name), None)


def triton_type(word: str) -> str:
    """Return the name of a format in config.pbtxt."""
    return f"TYPE_{number_format(word).triton}"


def to_tensor(array: npt.NDArray[np.generic]) -> torch.Tensor:
    """Return a tensor that shares an array's memory (a copy if the array is read-only or not contiguous).

    torch does not accept bf16 from numpy, so the bits are passed as 16-bit integers.
    """
    import numpy as np
    import torch

    array = np.require(array, requirements=["C", "W"])
    if array.dtype == numpy_type("bf16"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def to_array(tensor: torch.Tensor) -> npt.NDArray[np.generic]:
    """Return an array that shares the memory of a CPU tensor, with ml_dtypes' type for bf16."""
    import torch

    if tensor.dtype == torch.bfloat16:
        array: npt.NDArray[np.generic] = tensor.contiguous().view(torch.int16).numpy().view(numpy_type("bf16"))
        return array
    plain: npt.NDArray[np.generic] = tensor.numpy()
    return plain
