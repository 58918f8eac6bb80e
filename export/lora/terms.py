"""Turn adapter files into the terms they add to each weight, checking everything before any computation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.lora.delta import Term
from export.lora.factors import combine
from export.lora.keys import Module, read_modules
from export.lora.names import LoraPart, Sizes, partitions
from export.lora.scales import Strengths
from export.lora.settings import read_settings
from kit.errors import UsageError
from kit.safetensors_file import read_header

FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # of peft, of diffusers
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Lora:
    """An adapter file and its weight."""

    file: Path
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Parse FILE or FILE=WEIGHT, or a folder that peft or diffusers wrote in place of the file.

        An existing file whose name contains "=" is used as it is. Raises UsageError for a weight that is not a finite
        number and for a missing file.
        """
        if Path(text).exists():
            file = _file(Path(text))
            if not file.is_file():
                raise UsageError(f"--lora {text}: a folder without {' or '.join(FOLDER_FILES)}; give the file")
            return cls(file)
        name, equals, number = text.rpartition("=")
        file = _file(Path(name if equals else text))
        try:
            weight = float(number) if equals else 1.0
        except ValueError:
            raise UsageError(f"--lora {text}: weight {number!r} is not a number; write FILE=0.8") from None
        if not math.isfinite(weight):
            raise UsageError(f"--lora {text}: weight {number!r} is not finite; write FILE=0.8")
        if not file.is_file():
            raise UsageError(f"--lora {text}: {file} is not a file")
        return cls(file, weight)


def _file(path: Path) -> Path:
    """Return the adapter file of a folder, or the path as it is."""
    return next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)


def read_terms(loras: Sequence[Lora], sizes: Sizes, part: LoraPart, shapes: Shapes) -> dict[str, tuple[Term, ...]]:
    """Return the terms of all adapters by the name of the weight of one part that they change.

    `shapes` holds the shapes of the part's weights. Raises UsageError, naming the file and the key, for an adapter that
    cannot be applied, also if what cannot be applied belongs to another part.
    """
    terms: dict[str, list[Term]] = defaultdict(list)
    for lora in loras:
        settings = read_settings(lora.file)
        modules = [m for m in read_modules(lora.file, read_header(lora.file), sizes) if m.spot.part == part]
        strengths = Strengths.of(settings.get(part) if modules else None, modules, sizes)
        taken: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
        for index, module in enumerate(modules):
            for weight, term in _module_terms(lora, index, module, strengths, shapes):
                _claim(lora.file, taken[weight], weight, term, module)
                terms[weight].append(term)
    return {weight: tuple(found) for weight, found in terms.items()}


def changed_parts(loras: Sequence[Lora], sizes: Sizes) -> set[LoraPart]:
    """Return the parts that adapters change."""
    return {m.spot.part for lora in loras for m in read_modules(lora.file, read_header(lora.file), sizes)}


def _module_terms(
    lora: Lora, index: int, module: Module, strengths: Strengths, shapes: Shapes
) -> list[tuple[str, Term]]:
    """Check one module of a file against the weights that it changes."""
    where = f"{lora.file}: {module.name}"
    factors, rank = combine(where, module.tensors)
    scales = [strengths.scale(where, module, (index, j), rank) for j in range(len(module.spot.targets))]
    weights = [f"{target.module}.weight" for target in module.spot.targets]
    if any(weight not in shapes for weight in weights):
        return []  # a layer above the last one that the graph runs
    heights = [shapes[weight][0] for weight in weights]
    columns = shapes[weights[0]][1:]
    begin = _first_row(where, module, factors.shape, heights, columns)
    found = []
    offset = 0
    for weight, target, height, scale in zip(weights, module.spot.targets, heights, scales, strict=True):
        if offset < begin + factors.shape[0] and begin < offset + height:
            found.append((weight, Term(factors, lora.weight * scale, lora.file, offset - begin, target.swapped)))
        offset += height
    return found


def _first_row(
    where: str, module: Module, shape: tuple[int, ...], heights: Sequence[int], columns: tuple[int, ...]
) -> int:
    """Return the row of the module's whole matrix at which the factors begin; their shape decides."""
    piece = module.spot.piece
    if piece is None:
        needed = (sum(heights), *columns)
        if shape != needed:
            raise UsageError(f"{where}: the factors have shape {list(shape)}, the weight {list(needed)}")
        return 0
    splits = partitions(module.spot.known, heights, columns[0]) if len(columns) == 1 else []
    for split in splits:
        if piece < len(split) and shape == (split[piece], *columns):
            return sum(split[:piece])
    expected = " or ".join(str([split[piece], *columns]) for split in splits if piece < len(split))
    raise UsageError(
        f"{where}: the factors have shape {list(shape)}, which is not part {piece} of {module.spot.known!r}"
        + (f"; expected {expected}" if expected else ", a matrix without parts")
    )


def _claim(file: Path, taken: list[tuple[int, int, str]], weight: str, term: Term, module: Module) -> None:
    """Record the rows that a term changes; raises UsageError if another module of the file changes them too."""
    begin = -term.offset
    end = begin + term.factors.shape[0]
    for first, last, other in taken:
        if first < end and begin < last:
            names = " and ".join(repr(name) for name in sorted((other, module.name)))
            raise UsageError(
                f"{file}: {names} both change {weight!r}; the same difference may be stored under two names, so remove "
                "one of them"
            )
    taken.append((begin, end, module.name))
