"""Merge adapters into the weights of a part and describe them for the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, get_args

from export.derived import Derived
from export.lora.names import LoraPart, Sizes
from export.lora.settings import config_beside
from export.lora.terms import Lora, changed_parts, read_terms
from export.weights import Binding
from kit.errors import UsageError

MERGEABLE: tuple[LoraPart, ...] = get_args(LoraPart)  # parts that adapters can change


def merge(binding: Binding, loras: Sequence[Lora], sizes: Sizes, part: LoraPart = "transformer") -> Binding:
    """Return a binding of a part in which every weight that an adapter changes is derived; the others are unchanged.

    A merged weight keeps the type of its source, except that FP8 becomes BF16, because a sum may not fit the FP8 scale.
    Raises UsageError, naming the file and the key, for an adapter that cannot be applied.
    """
    shapes = {name: tensor.shape for name, tensor in binding.tensors.items()}
    shapes |= {name: tensor.shape for name, tensor in binding.derived.items()}
    tensors, derived, scales = dict(binding.tensors), dict(binding.derived), dict(binding.scales)
    for name, terms in read_terms(loras, sizes, part, shapes).items():
        scale = scales.pop(name, None)
        if name in derived:
            base = derived[name]
        else:
            stored = tensors.pop(name)
            base = Derived(stored.name, stored.dtype, stored)
        dtype = "BF16" if scale is not None else base.dtype
        derived[name] = replace(base, dtype=dtype, scale=scale.value if scale is not None else base.scale, terms=terms)
    return Binding(tensors, derived, scales)


def check_parts(loras: Sequence[Lora], sizes: Sizes, parts: Collection[str]) -> None:
    """Raise UsageError if adapters change a part that is not among `parts`."""
    for part in sorted(changed_parts(loras, sizes) - set(parts)):
        raise UsageError(f"--lora changes the {part}, which --parts leaves out")


def record(loras: Sequence[Lora]) -> list[dict[str, Any]]:
    """Describe adapters for a manifest: name, weight and digest of the content, including peft's config."""
    records = []
    for lora in loras:
        content = hashlib.sha256()
        for file in (lora.file, config_beside(lora.file)):
            if file is not None:
                with file.open("rb") as stream:
                    content.update(hashlib.file_digest(stream, "sha256").digest())
        records.append({"file": lora.file.name, "weight": lora.weight, "digest": content.hexdigest()})
    return records
