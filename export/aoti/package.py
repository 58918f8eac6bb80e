"""Compile one module at one set of shapes to an AOTInductor package that holds no weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from kit.dtypes import torch_type
from kit.ports import Ports

# Weights stay outside the package. The wrapper is cheap to run and slow to optimize, so it is not optimized.
INDUCTOR = {"aot_inductor.package_constants_in_so": False, "aot_inductor.compile_wrapper_opt_level": "O0"}


def example(wired: Ports, sizes: Mapping[str, int], device: str) -> dict[str, Tensor]:
    """Return example inputs with the shapes of a bucket."""
    return {
        port.name: torch.ones(port.shape(sizes), dtype=torch_type(port.dtype), device=device) for port in wired.inputs
    }


def compile_package(module: nn.Module, inputs: Mapping[str, Tensor], path: Path) -> None:
    """Trace a module at the shapes of its inputs and compile it to a package without weights."""
    with torch.no_grad(), _quiet():
        program = torch.export.export(module, (), kwargs=dict(inputs), strict=False)
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=dict(INDUCTOR))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence a deprecation in torch itself and a compiler note about graphs that are frozen in a package."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            yield
    finally:
        logger.setLevel(level)
