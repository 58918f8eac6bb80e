"""One AOTInductor package: machine code of a part at one set of shapes, given its weights by whoever loads it.

torch's own `aoti_load_package` asks for a C++ compiler on a CPU and opens archives that may hold pickled inputs; the
loader behind it does neither, so it is called directly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kit.errors import ArtifactError


class Package:
    """Loaded machine code; called with inputs by name. The weights must outlive it: it keeps their addresses."""

    def __init__(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Load; raises ArtifactError when torch cannot, or when a weight is missing."""
        try:
            self.loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
            needed = self.loader.get_constant_fqns()
            missing = sorted(set(needed) - set(weights))
            if missing:
                raise ArtifactError(f"{path}: wants weight {missing[0]!r}, which the weights beside it do not have")
            self.weights = {name: weights[name] for name in needed}
            self.loader.load_constants(self.weights, False, True, True)  # active set, all of them, memory stays ours
            inputs = json.loads(self.loader.get_call_spec()[0])[1]["children_spec"][1]
        except RuntimeError as error:
            raise ArtifactError(f"{path}: torch cannot load it: {error}") from error
        self.names: list[str] = json.loads(inputs["context"])

    def __call__(self, **inputs: Tensor) -> Tensor:
        outputs: list[Tensor] = self.loader.boxed_run([inputs[name] for name in self.names])
        return outputs[0]
