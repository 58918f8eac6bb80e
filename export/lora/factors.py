"""Check the tensors of one module of an adapter file and combine them to a product with its rank."""

from __future__ import annotations

import math
from collections.abc import Mapping

from export.lora.delta import Factors, Full, Hadamard, Kronecker, LowRank
from export.lora.keys import Role
from export.values import READABLE, read_all
from kit.dtypes import number_format
from kit.errors import UsageError
from kit.safetensors_file import StoredTensor

_METHODS: Mapping[str, tuple[Role, ...]] = {
    "LoRA": ("A", "B"),
    "LoHa": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    "LoKr": ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
    "full difference": ("diff",),
}


def combine(where: str, tensors: Mapping[Role, StoredTensor]) -> tuple[Factors, int | None]:
    """Return the product of a module's factors and their rank, None for a module without low-rank factors.

    `where` names the file and the module in messages. Raises UsageError for factors that are missing, do not fit each
    other, or belong to more than one method.
    """
    found = set(tensors) - {"alpha"}
    if not found:
        raise UsageError(f"{where}: has alpha but no factors")
    methods = [method for method, roles in _METHODS.items() if found & set(roles)]
    if len(methods) > 1:
        raise UsageError(
            f"{where}: has factors of a {' and of a '.join(methods)}, so its effect is ambiguous; keep one of them"
        )
    for role in found:
        tensor = tensors[role]
        if not _readable(tensor):
            raise UsageError(f"{where}: {tensor.name!r} is stored as {tensor.dtype}; expected {', '.join(READABLE)}")
        if role != "diff" and len(tensor.shape) != 2:
            raise UsageError(f"{where}: {tensor.name!r} has shape {list(tensor.shape)}, not a matrix")
    match methods[0]:
        case "LoRA":
            _all(where, found, _METHODS["LoRA"])
            return LowRank(tensors["A"], tensors["B"]), _rank(where, tensors["B"], tensors["A"])
        case "LoHa":
            _all(where, found, _METHODS["LoHa"])
            return _hadamard(where, tensors)
        case "LoKr":
            return _kronecker(where, tensors)
        case _:
            return Full(tensors["diff"]), None


def _readable(tensor: StoredTensor) -> bool:
    return tensor.dtype in READABLE


def _all(where: str, found: set[Role], needed: tuple[Role, ...]) -> None:
    if found != set(needed):
        lacking = " and ".join(sorted(set(needed) - found))
        raise UsageError(f"{where}: lacks {lacking}, has {', '.join(sorted(found))}")


def _hadamard(where: str, tensors: Mapping[Role, StoredTensor]) -> tuple[Factors, int]:
    first, second = (tensors["hada_w1_a"], tensors["hada_w1_b"]), (tensors["hada_w2_a"], tensors["hada_w2_b"])
    rank = _rank(where, *first)
    if _rank(where, *second) != rank:
        raise UsageError(f"{where}: the two products of the LoHa have different ranks, so alpha / rank is undefined")
    made = Hadamard(first, second)
    if (second[0].shape[0], second[1].shape[1]) != made.shape:
        raise UsageError(f"{where}: the two products of the LoHa have different shapes")
    return made, rank


def _kronecker(where: str, tensors: Mapping[Role, StoredTensor]) -> tuple[Factors, int | None]:
    left = _side(where, tensors, "lokr_w1", "lokr_w1_a", "lokr_w1_b")
    right = _side(where, tensors, "lokr_w2", "lokr_w2_a", "lokr_w2_b")
    ranks = {_rank(where, *side) for side in (left, right) if len(side) == 2}
    if len(ranks) > 1:
        raise UsageError(f"{where}: the two sides of the LoKr have ranks {sorted(ranks)}, so alpha / rank is undefined")
    return Kronecker(left, right), ranks.pop() if ranks else None


def _side(
    where: str, tensors: Mapping[Role, StoredTensor], whole: Role, first: Role, second: Role
) -> tuple[StoredTensor, ...]:
    """Return one side of a Kronecker product: one matrix, or two matrices to multiply."""
    found = {role for role in (whole, first, second) if role in tensors}
    if found == {whole}:
        return (tensors[whole],)
    if found == {first, second}:
        return tensors[first], tensors[second]
    raise UsageError(
        f"{where}: a LoKr needs {whole}, or {first} and {second}; the file has {', '.join(sorted(found)) or 'none'}"
    )


def _rank(where: str, left: StoredTensor, right: StoredTensor) -> int:
    rank = left.shape[1]
    if rank != right.shape[0]:
        raise UsageError(
            f"{where}: {left.name!r} {list(left.shape)} and {right.name!r} {list(right.shape)} cannot be multiplied"
        )
    if rank == 0:
        raise UsageError(f"{where}: has rank 0")
    return rank


def read_alpha(where: str, stored: StoredTensor) -> float:
    """Read an alpha tensor: one finite number of any numeric type."""
    if math.prod(stored.shape) != 1:
        raise UsageError(f"{where}: alpha {stored.name!r} has shape {list(stored.shape)}, not one number")
    if stored.dtype == "BOOL" or not number_format(stored.dtype).numpy:
        raise UsageError(f"{where}: alpha {stored.name!r} is stored as {stored.dtype}, which is not a number")
    alpha = float(read_all(stored).reshape(()))
    if not math.isfinite(alpha):
        raise UsageError(f"{where}: alpha {stored.name!r} is {alpha}, not a finite number")
    return alpha
