"""Compare attention kernels at FLUX.2's shape: heads of 128, text and image in one sequence, no mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.cases import Case, RunSettings, variant_of
from benchmarks.gpu.clock import Unavailable, clock
from benchmarks.gpu.parts import Measure, relative_error

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def open_attention(settings: RunSettings, _: str, kernel: str) -> Measure:
    """Measure one kernel at the sequence length of a block; one call is the attention of one block."""
    variant = variant_of(settings)

    def measure(case: Case) -> dict[str, Any]:
        tokens = variant.tokens(case.side, case.side) + variant.text_tokens
        heads, width = variant.transformer.heads, variant.transformer.head_dim
        generator = torch.Generator("cpu").manual_seed(3)
        query, key, value = (
            torch.randn(case.batch, heads, tokens, width, generator=generator).to(settings.device, torch.bfloat16)
            for _ in range(3)
        )
        call = kernel_call(kernel, settings)
        try:
            found = call(query, key, value)
        except RuntimeError as error:  # torch has no such kernel for the shape or the device
            raise Unavailable(f"{kernel}: {str(error).splitlines()[0]}") from None
        exact = scaled_dot_product_attention(query.float(), key.float(), value.float())
        row = {
            "flops": 4.0 * case.batch * heads * tokens**2 * width,
            "tokens": tokens,
            "error": relative_error(found, exact),
            "reference": "fp32",
        }
        del exact
        return row | clock(lambda: call(query, key, value), settings.device, settings.seconds)

    return measure


def kernel_call(kernel: str, settings: RunSettings) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a call that runs one kernel; `default` lets torch choose."""
    if kernel == "fp8":
        raise Unavailable("torch has no FP8 attention kernel; the FlashAttention 3 package has one")
    if kernel == "flex":
        from torch.nn.attention.flex_attention import flex_attention

        compiled: Any = torch.compile(flex_attention, backend=settings.backend, dynamic=False)
        return lambda q, k, v: compiled(q, k, v)
    if kernel == "default":
        return lambda q, k, v: scaled_dot_product_attention(q, k, v)
    backend = BACKENDS[kernel]

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value)

    return call
