"""Images a second of diffusers' own pipeline, in a process of its own, at the number of threads that suits it best."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

TRIAL = 8  # images by which numbers of threads are compared
_pipeline: Any = None


class DiffusersRate:
    """A klein checkpoint in diffusers in fp32; `threads` is the number that was fastest of 1, half and all cores."""

    def __init__(self, checkpoint: Path, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)
        cores = os.cpu_count() or 1
        rates = {}
        for threads in sorted({1, max(1, cores // 2), cores}):
            self._start(checkpoint, threads)
            self.images_per_second(2)
            rates[threads] = self.images_per_second(TRIAL)
            self._pool.shutdown()
        self.threads = max(rates, key=lambda threads: rates[threads])
        self._start(checkpoint, self.threads)

    def __enter__(self) -> DiffusersRate:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()

    def images_per_second(self, count: int) -> float:
        """Generate `count` images one after the other."""
        return self._pool.submit(_generate, self._fields, count).result()

    def _start(self, checkpoint: Path, threads: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, mp_context=spawn, initializer=_load, initargs=(checkpoint, threads))


def _load(checkpoint: Path, threads: int) -> None:
    global _pipeline
    import torch
    from diffusers import Flux2KleinPipeline
    from diffusers.utils import logging
    from transformers.utils import logging as other_logging

    logging.disable_progress_bar()
    other_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    _pipeline = Flux2KleinPipeline.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True)
    _pipeline.set_progress_bar_config(disable=True)


def _generate(fields: Mapping[str, Any], count: int) -> float:
    import torch

    start = time.perf_counter()
    for seed in range(count):
        _pipeline(
            prompt=fields["prompt"],
            width=fields["width"],
            height=fields["height"],
            num_inference_steps=fields["steps"],
            guidance_scale=1.0,
            max_sequence_length=_pipeline.tokenizer.model_max_length,
            generator=torch.Generator().manual_seed(seed),
        )
    return count / (time.perf_counter() - start)
