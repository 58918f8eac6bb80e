"""Turn adapter files into the terms they add to each weight, checking everything before any computation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.lora.delta import Kronecker, LowRank, Term
from export.lora.keys import Module, Role, read_modules
from export.lora.settings import LoraSettings, read_settings
from export.values import READABLE, read_all
from kit.errors import UsageError
from kit.safetensors_file import StoredTensor, read_header
from kit.variants import Transformer

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Lora:
    """An adapter file and its weight."""

    file: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Parse FILE or FILE=WEIGHT; raises UsageError for a weight that is not a finite number and for a missing file.

        An existing file whose name contains "=" is used as it is.
        """
        if Path(text).is_file():
            return cls(Path(text))
        name, equals, number = text.rpartition("=")
        file = Path(name if equals else text)
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            raise UsageError(f"--lora {text}: weight {number!r} is not a number; write FILE=0.8") from None
        if not math.isfinite(weight):
            raise UsageError(f"--lora {text}: weight {number!r} is not finite; write FILE=0.8")
        if not file.is_file():
            raise UsageError(f"--lora {text}: {file} is not a file")
        return cls(file, weight)


def read_terms(loras: Sequence[Lora], sizes: Transformer, shapes: Shapes) -> dict[str, tuple[Term, ...]]:
    """Return the terms of all adapters by the name of the weight they change.

    `shapes` holds the shapes of the transformer's weights. Raises UsageError, naming the file and the key, for an
    adapter that cannot be applied.
    """
    terms: dict[str, list[Term]] = defaultdict(list)
    for lora in loras:
        settings = read_settings(lora.file)
        for module in read_modules(lora.file, read_header(lora.file), sizes):
            for weight, term in _module_terms(lora, module, settings, shapes):
                terms[weight].append(term)
    return {weight: tuple(found) for weight, found in terms.items()}


def _module_terms(lora: Lora, module: Module, settings: LoraSettings | None, shapes: Shapes) -> list[tuple[str, Term]]:
    """Check one module of a file against the weights that it changes."""
    where = f"{lora.file}: {module.name}"
    for tensor in module.tensors.values():
        if tensor.dtype not in READABLE:
            raise UsageError(
                f"{lora.file}: {tensor.name!r} is stored as {tensor.dtype}; expected {', '.join(READABLE)}"
            )
    factors, rank = _factors(where, module.tensors)
    scale = _scale(where, module, rank, settings, isinstance(factors, Kronecker))
    weights = [f"{target.module}.weight" for target in module.targets]
    heights = [shapes[weight][0] for weight in weights]
    needed = (sum(heights), shapes[weights[0]][1])
    if factors.shape != needed:
        raise UsageError(f"{where}: the factors have shape {list(factors.shape)}, the weight {list(needed)}")
    return [
        (weight, Term(factors, lora.weight * scale, lora.file, sum(heights[: target.third or 0]), target.swapped))
        for weight, target in zip(weights, module.targets, strict=True)
    ]


def _factors(where: str, tensors: Mapping[Role, StoredTensor]) -> tuple[LowRank | Kronecker, int | None]:
    """Combine the factors of a module; returns them with their rank, None for a module without low-rank factors."""
    found = set(tensors) - {"alpha"}
    for role in found:
        if len(tensors[role].shape) != 2:
            raise UsageError(f"{where}: {tensors[role].name!r} has shape {list(tensors[role].shape)}, not a matrix")
    if not found:
        raise UsageError(f"{where}: has alpha but no factors")
    if found & {"A", "B"}:
        if found != {"A", "B"}:
            lacking = " and ".join(sorted({"A", "B"} - found)) or "nothing"
            raise UsageError(f"{where}: lacks {lacking}, has {', '.join(sorted(found))}")
        return LowRank(tensors["A"], tensors["B"]), _rank(where, tensors["B"], tensors["A"])
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


def _scale(where: str, module: Module, rank: int | None, settings: LoraSettings | None, kronecker: bool) -> float:
    """Return alpha / rank; a LoKr of two whole matrices has no rank, so its alpha is ignored."""
    stored = module.tensors.get("alpha")
    if kronecker and settings is not None:
        raise UsageError(f"{settings.origin}: these are settings of a LoRA, but {module.name!r} is a LoKr")
    if rank is None:
        return 1.0
    if stored is None:
        return settings.scale(module.targets[0].module, rank) if settings else 1.0
    if math.prod(stored.shape) != 1:
        raise UsageError(f"{where}: alpha {stored.name!r} has shape {list(stored.shape)}, not one number")
    alpha = float(read_all(stored).reshape(()))
    if not math.isfinite(alpha):
        raise UsageError(f"{where}: alpha {stored.name!r} is {alpha}, not a finite number")
    return alpha / rank
