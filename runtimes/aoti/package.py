"""One AOTInductor package: machine code of a part for one set of shapes; the caller provides the weights.

On a CPU, torch's `aoti_load_package` requires a C++ compiler, and it opens archives that may contain pickled inputs.
The loader that it uses does neither, so it is called directly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from kit.errors import ArtifactError


class Package:
    """Loaded machine code, called with inputs by name. It keeps the addresses of the weights, which must outlive it."""

    def __init__(self, path: Path, weights: Mapping[str, Tensor]) -> None:
        """Load; raises ArtifactError if torch cannot load the package or a weight is missing."""
        try:
            self.loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
            needed = self.loader.get_constant_fqns()
            missing = sorted(set(needed) - set(weights))
            if missing:
                raise ArtifactError(f"{path}: needs the weight {missing[0]!r}, which the weight file does not contain")
            self.weights = {name: weights[name] for name in needed}
            self.loader.load_constants(
                self.weights, False, True, True
            )  # active set; check that all are given; keep our memory
            inputs = json.loads(self.loader.get_call_spec()[0])[1]["children_spec"][1]
        except RuntimeError as error:
            raise ArtifactError(f"{path}: torch cannot load it: {error}") from error
        self.names: list[str] = json.loads(inputs["context"])

    def __call__(self, **inputs: Tensor) -> Tensor:
        outputs: list[Tensor] = self.loader.boxed_run([inputs[name] for name in self.names])
        return outputs[0]
