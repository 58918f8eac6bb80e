"""Kernel timings per GPU, driver and TensorRT version, so that later builds need not measure them again."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import tensorrt as trt

from kit.atomic_file import write_file
from kit.cuda_device import CudaDevice

logger = logging.getLogger(__name__)


class TimingCache:
    """One file of timings; a file that TensorRT rejects is replaced, with a warning."""

    def __init__(self, folder: Path, device: CudaDevice) -> None:
        title = re.sub(r"[^A-Za-z0-9]+", "-", device.title).strip("-").lower()
        self.file = folder / f"{title}-driver-{device.driver}-tensorrt-{trt.__version__}.cache"

    def attach(self, config: trt.IBuilderConfig) -> None:
        """Load the saved timings into a build."""
        kept = self.file.read_bytes() if self.file.is_file() else b""
        cache = config.create_timing_cache(kept)
        if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
            logger.warning("%s: TensorRT rejects these timings; starting without them", self.file)
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def keep(self, config: trt.IBuilderConfig) -> None:
        """Save the timings of a build, even of a stopped one; if they cannot be written, warn and go on."""
        cache = config.get_timing_cache()
        if cache is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.file, bytes(cache.serialize()))
        except OSError as error:
            logger.warning("%s: the timings were not saved (%s)", self.file, error)
